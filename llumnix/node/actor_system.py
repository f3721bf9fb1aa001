"""A node's actors: started with what each must know, kept alive, told of each view."""

import asyncio
from collections.abc import Callable

from llumnix.actors.actor_supervision import Supervised, Supervision
from llumnix.actors.dispatcher import DispatcherActor
from llumnix.actors.instance import Report
from llumnix.actors.instance_supervisor import NodeActor, Roster, Surroundings
from llumnix.actors.manager import ManagerActor, Rescheduling, Scaling
from llumnix.cluster import ClusterView
from llumnix.config import Config
from llumnix.dataplane.exchange import Exchange
from llumnix.migration.actor import Books, MigrationActor
from llumnix.migration.departures import Rules
from llumnix.migration.record import MigrationRecord
from llumnix.migration.service import Migrations
from llumnix.migration.source import MigrationLimits
from llumnix.node.control_plane import ControlPlane
from llumnix.node.options import Policies, no_pairs
from llumnix.policy.scaling import ScalingTerms

LOOK_AFTER_SECONDS = 1.0  # between looks at the instances' actors


class Acting:
    """The actors, and what carries out their decisions on the loop. What they know outlives them.

    `start` makes all else that is public here.
    """

    dispatch: Supervised[DispatcherActor]
    supervise: Supervised[NodeActor]
    manage: Supervised[ManagerActor]
    migrations: Migrations
    rescheduling: Rescheduling

    def __init__(
        self,
        config: Config,
        policies: Policies,
        loop: asyncio.AbstractEventLoop,
        control: ControlPlane,
        give_up: Callable[[str], None],
    ) -> None:
        """`give_up`: called with a sentence when this node has to end, as actors keep dying."""
        self._config = config
        self._policies = policies
        self._loop = loop
        self.supervision = Supervision(loop, give_up)
        self._control = control
        self._going = False  # while there are actors to tell of a new view
        self._admits: Supervised[MigrationActor] | None = None

    def start(self, model: str, exchange: Exchange, around: Surroundings) -> None:
        """Start the actors, which wait for what they are told."""
        config, keep = self._config, self.supervision.keep
        policies = self._policies
        self.dispatch = keep(
            lambda: DispatcherActor.start(
                node=config.node,
                policy=policies.dispatch,
                top_k=config.dispatch_top_k,
                terms=policies.terms,
            ),
            lambda actor: actor.tell(DispatcherActor.update_view, self._control.view()),
        )
        roster = Roster(initial=config.initial_instances)
        self.supervise = keep(
            lambda: NodeActor.start(
                node=config.node,
                model=model,
                limit=config.max_instances,
                drain_timeout=config.drain_timeout,
                around=around,
                roster=roster,
            ),
            lambda actor: actor.tell(NodeActor.take_over),
        )
        books, limits = Books(), (config.migration_max_requests, config.migration_max_blocks)
        admits = keep(lambda: MigrationActor.start(self._control.handshake, *limits, books))
        self._admits = admits
        self.migrations = Migrations(exchange, admits, self._control.view, self._rules())
        self.rescheduling = Rescheduling(
            self._loop,
            self.migrations.carry_out,
            self._control.registry.put_desired,
            config.migration_interval,
        )
        self.manage = keep(
            lambda: ManagerActor.start(
                lambda: self._control.election.epoch or None,
                lambda: self._control.registry.alive,
                self.rescheduling.command,
                policies.terms,
                policies.planner or no_pairs,
                drains=config.migration,
                scaling=self._scaling() if config.autoscale else None,
                pace=policies.pace,
            ),
            lambda actor: actor.tell(ManagerActor.update_view, self._control.view()),
        )
        self._going = True
        self._look_after()

    def stop(self) -> None:
        """Stop the actors."""
        self._going = False
        self.supervision.stop()

    def lead(self) -> None:
        """Have the manager act from now on, whenever this node leads, if it is to do anything."""
        if self._config.migration or self._config.autoscale:
            self.rescheduling.start(self.manage)

    def see(self, view: ClusterView) -> bool:
        """Tell the actors of a new view, from any thread; whether there are any."""
        if self._going:
            self.dispatch.notify(DispatcherActor.update_view, view)
            self.supervise.notify(NodeActor.update_view, view)
            self.manage.notify(ManagerActor.update_view, view)
        return self._going

    def sweep(self, record: MigrationRecord) -> None:
        """See to a record of a migration that this node has, or had, proposed; from any thread."""
        if self._admits is not None:
            self._admits.notify(MigrationActor.sweep, record)

    def tell_supervisor(self, slot: int, report: Report) -> None:
        """An instance has changed; a supervisor that is started later asks for all reports."""
        self.supervise.notify(NodeActor.changed, slot, report)

    def _look_after(self) -> None:
        """Have the supervisor see, now and then, whether its instances' actors live."""
        if self._going:
            self.supervise.notify(NodeActor.look_after)
            self._loop.call_later(LOOK_AFTER_SECONDS, self._look_after)

    def _rules(self) -> Rules:
        config = self._config
        limits = MigrationLimits(
            config.migration_max_stages,
            config.migration_last_stage_max_blocks,
            config.migration_tail_tokens,
            config.migration_timeout,
        )
        return Rules(limits, config.migration_request, self._policies.terms)

    def _scaling(self) -> Scaling:
        config = self._config
        terms = ScalingTerms(
            low=config.autoscale_low,
            high=config.autoscale_high,
            period=config.autoscale_period,
            cooldown=config.autoscale_cooldown,
            minimum=config.autoscale_min,
            maximum=config.autoscale_max,
            patience=config.start_timeout,
        )
        return Scaling(terms, self.rescheduling.wish)
