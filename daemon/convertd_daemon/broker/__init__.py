"""The process that stays root: accepts, decides, queues, forks, reaps. Never loads gRPC."""
