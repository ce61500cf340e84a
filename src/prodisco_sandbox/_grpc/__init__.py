"""gRPC: the only package that knows grpc.aio."""
