"""The process that serves gRPC, without privileges. See `main`."""
