"""The instances of a simulated cluster: they come, report, and go, as the scaler wants it."""

from collections.abc import Callable
from types import MappingProxyType

from llumnix.cluster import (
    ClusterView,
    InstanceId,
    InstanceInfo,
    InstanceLoad,
    InstanceState,
    NodeInfo,
)
from llumnix.policy.decision_context import Terms
from llumnix.policy.scaling import Action, Decision, Scaler
from llumnix.simulator.cluster import ClusterConfig
from llumnix.simulator.instance import NODE, SimInstance, VirtualClock
from llumnix.simulator.result import Story


class Fleet:
    """All instances that are there, and the view that everybody has of them."""

    def __init__(
        self,
        config: ClusterConfig,
        terms: Terms,
        clock: VirtualClock,
        on_end: Callable[[Story], None],
    ) -> None:
        self._config = config
        self._model = config.engine.model()
        self._clock = clock
        self._on_end = on_end
        self.instances: dict[InstanceId, SimInstance] = {}
        self._infos: dict[InstanceId, InstanceInfo] = {}
        self._loads: dict[InstanceId, InstanceLoad] = {}
        self._made = 0
        self._spent = 0.0  # seconds of those that have ended
        scaling = config.scaling
        self._scaler = Scaler(scaling, terms.classes) if scaling else None
        most = scaling.maximum if scaling else config.instances
        self._nodes = MappingProxyType({NODE: NodeInfo(NODE, "", "simulated", 0, most)})
        self._desired = config.instances
        for _ in range(config.instances):
            self._start(0.0)
        self.view = ClusterView()

    @property
    def spent(self) -> float:
        """Seconds that instances have been there, added up."""
        here = sum(self._clock.now - i.began for i in self.instances.values())
        return self._spent + here

    def report(self) -> ClusterView:
        """Every instance says what has changed; those that have drained end."""
        for instance in list(self.instances.values()):
            if instance.state is InstanceState.DRAINING and instance.idle:
                self._end(instance)
            elif instance.changed:
                instance.changed = False
                self._loads[instance.id] = instance.load()
        self.view = ClusterView(
            nodes=self._nodes,
            instances=MappingProxyType(dict(self._infos)),
            loads=MappingProxyType(dict(self._loads)),
            desired=MappingProxyType({NODE: self._desired}),
        )
        return self.view

    def scale(self) -> None:
        """Have as many instances as the scaler wants."""
        if self._scaler is None:
            return
        decision = self._scaler.decide(self.view, self._clock.now)
        if decision is not None:
            self._change(decision)

    def _change(self, decision: Decision) -> None:
        wanted = decision.desired[NODE]
        if decision.action is Action.REMOVE and decision.victim is not None:
            self._become(self.instances[decision.victim], InstanceState.DRAINING)
        elif decision.action is Action.KEEP:
            draining = [i for i in self.instances.values() if i.state is InstanceState.DRAINING]
            for instance in draining[: wanted - self._desired]:
                self._become(instance, InstanceState.READY)
        else:
            for _ in range(wanted - self._desired):
                self._start(self._config.start_seconds)
        self._desired = wanted

    def _start(self, seconds: float) -> None:
        instance = SimInstance(f"i{self._made:04d}", self._model, self._clock)
        self._made += 1
        instance.on_end = self._on_end
        self.instances[instance.id] = instance
        self._infos[instance.id] = instance.info
        if seconds:
            self._clock.after(seconds, self._become, instance, InstanceState.READY)
        else:
            self._become(instance, InstanceState.READY)

    def _become(self, instance: SimInstance, state: InstanceState) -> None:
        instance.state = state
        self._infos[instance.id] = instance.info

    def _end(self, instance: SimInstance) -> None:
        self._spent += self._clock.now - instance.began
        for known in (self.instances, self._infos, self._loads):
            known.pop(instance.id, None)
