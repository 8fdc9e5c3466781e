"""Archives of kind code: Python of their authors', as TorchServe, Multi Model Server and SageMaker's toolkits run it.

What such an archive runs is read from its members (`entry_point`), never by importing them: this package explains and
refuses. Only `server.worker.sandbox` runs code, in processes of its own, where the operator allows it.
"""
