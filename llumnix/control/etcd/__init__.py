"""An etcd client: calls, watches, leases, a server of its own. Nothing of llumnix in it."""
