"""The computation: memory pools of rows, and engines that run a batch's forward passes on CPU or accelerator."""
