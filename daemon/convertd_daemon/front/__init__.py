"""The process that knows gRPC, and has no right to anything. See `main`."""
