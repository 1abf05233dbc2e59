"""The embedded world: a 7-DOF arm with the Panda's kinematics over a table of coloured objects, in plain MuJoCo."""

from vlaexp.env.tabletop.env import TabletopEnv as TabletopEnv
from vlaexp.env.tabletop.scene import CameraPose as CameraPose
from vlaexp.env.tabletop.scene import ObjectPool as ObjectPool
