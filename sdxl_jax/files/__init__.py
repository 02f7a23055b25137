"""Files, whatever is in them: atomic writes, locks, what differs between two trees. Nothing of the domain."""
