"""The administrator's commands: check a policy, describe it, print the unit's drop-in."""
