"""The policy: read, checked, bound to ids, and asked."""
