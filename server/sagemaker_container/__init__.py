"""What a container of SageMaker's is told by its environment, and what it says of batch transforms."""
