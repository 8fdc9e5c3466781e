"""The planner predicts by simulation how many models fit, the tail latency and the cost."""
