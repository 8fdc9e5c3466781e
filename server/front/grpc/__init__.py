"""The gRPC front: the Open Inference Protocol over the data plane that the HTTP fronts have. No torch, no numpy.

It is a process of its own, and the only one of a server that imports grpcio (the optional extra `fleetcast[grpc]`).
"""
