"""Tests of the images and compose files, without a container engine."""
