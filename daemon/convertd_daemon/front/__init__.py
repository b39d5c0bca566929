"""The process that speaks gRPC and has no privileges. See `main`."""
