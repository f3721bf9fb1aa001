"""What can go wrong between us and etcd."""


class EtcdError(Exception):
    """Base of all errors of this package; its text is one plain sentence."""


class EtcdUnavailable(EtcdError):
    """No member answered within the deadline. A write that raises this had no effect."""


class EtcdOutcomeUnknown(EtcdUnavailable):
    """A write was sent and no answer came: it may have happened, or may yet happen."""


class EtcdRefused(EtcdError):
    """etcd answered, and the answer is no: the call had no effect and repeating it won't help."""


class LeaseNotFound(EtcdRefused):
    """The lease named by the call has ended."""


class WatchEnded(EtcdError):
    """A watch stream can't go on; whoever needs it lists again."""


class EmbeddedEtcdError(EtcdError):
    """The embedded etcd can't be started."""


class NameTaken(EtcdError):
    """Another process is the node that this one was to be."""
