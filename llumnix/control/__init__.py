"""Everything that touches etcd: membership, loads, leases, elections. Nothing else does."""
