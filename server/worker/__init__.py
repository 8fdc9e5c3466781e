"""The process that holds models and computes."""
