"""Members, the plan (owners of shards, workers of cells), and the rules by which the controller changes it. Pure."""

from psa_store.cluster.controller import Publish, TakeOver, View, assign_cells, assign_shards, decide
from psa_store.cluster.members import Member, ProcessRole, believed, member_from_json
from psa_store.cluster.plan import NO_WORKER, Cell, Cut, JobShape, Phase, Plan, Server, newest_common, plan_from_json

__all__ = [
    "NO_WORKER",
    "Cell",
    "Cut",
    "JobShape",
    "Member",
    "Phase",
    "Plan",
    "ProcessRole",
    "Publish",
    "Server",
    "TakeOver",
    "View",
    "assign_cells",
    "assign_shards",
    "believed",
    "decide",
    "member_from_json",
    "newest_common",
    "plan_from_json",
]
