"""SageMaker's asynchronous invocations: requests that are answered into a bucket. Runs in a front."""
