"""What systemd and node_exporter see of the daemon."""
