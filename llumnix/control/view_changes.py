"""Who came and who went between two views, in sentences for the log."""

from collections.abc import Iterator

from llumnix.cluster import ClusterView


def changes(old: ClusterView, new: ClusterView) -> Iterator[str]:
    """One sentence for each node and instance that joined, left or changed its state, and leader.

    Which node leads has its epoch with it.
    """
    if old.nodes is not new.nodes:
        yield from (f"Node {n} has left." for n in sorted(old.nodes.keys() - new.nodes.keys()))
        for name, node in sorted(new.nodes.items()):
            was = old.nodes.get(name)
            if was is None:
                yield f"Node {name} has joined, at {node.address}."
            elif was.epoch != node.epoch:
                yield f"Node {name} has been started anew, at {node.address}."
    if old.instances is not new.instances:
        left = sorted(old.instances.keys() - new.instances.keys())
        yield from (f"Instance {i} of node {old.instances[i].node} has left." for i in left)
        for name, instance in sorted(new.instances.items()):
            before = old.instances.get(name)
            if before is None:
                yield f"Instance {name} of node {instance.node} has joined: {instance.state}."
            elif before.state is not instance.state:
                yield f"Instance {name} of node {instance.node} is {instance.state}."
    if (old.leader, old.leader_epoch) != (new.leader, new.leader_epoch):
        if new.leader is None:
            yield f"Nobody leads, after node {old.leader} in epoch {old.leader_epoch}."
        else:
            yield f"Node {new.leader} leads, in epoch {new.leader_epoch}."
