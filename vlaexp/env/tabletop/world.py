"""The physics of the embedded world: one MuJoCo model, compiled once, into which a `Scene` is written at each reset.

Every object slot, receptacle and camera exists in the compiled model; `load` sets sizes, masses, colours and poses,
then lets MuJoCo recompute what it derives from them (`mj_setConst`). That keeps one renderer alive for all episodes.
"""

import numpy as np

from vlaexp.env.tabletop import kinematics as kin
from vlaexp.env.tabletop.rendering import mujoco
from vlaexp.env.tabletop.scene import (
    BOX_WALL_HEIGHT,
    COLOURS,
    MAX_OBJECTS,
    PUSH_LINE,
    RECEPTACLE_HALF_SIZE,
    RECEPTACLES,
    SHAPES,
    CameraPose,
    Scene,
    TableObject,
)

TIMESTEP = 0.005
FINGER_TRAVEL = 0.04  # m, each finger
EXTENT = 2.322  # m, of the whole scene
OBJECT_DENSITY = 1200.0  # kg/m^3: a 4 cm cube weighs 77 g
PARKED = np.array([0.0, 0.0, -1.0])  # where unused slots wait, without gravity or contact

# Who collides with whom: arm with table, receptacles and objects, but not with itself.
ARM, FIXED, OBJECT = 1, 2, 4
_ARM_BITS = f'contype="{ARM}" conaffinity="0"'
_FIXED_BITS = f'contype="{FIXED}" conaffinity="{ARM | OBJECT}"'
_GEOM_TYPE = {
    "box": mujoco.mjtGeom.mjGEOM_BOX,
    "cylinder": mujoco.mjtGeom.mjGEOM_CYLINDER,
    "sphere": mujoco.mjtGeom.mjGEOM_SPHERE,
}

# Half extents, mass and inertia of an unused slot, never a former scene's: the solver scales with the mean inertia.
_EMPTY_SLOT = ("box", np.full(3, 0.02), 0.08, np.full(3, 2e-5))

# Per link: mass (kg), centre of mass (m), diagonal inertia (kg m^2), then capsules "from to radius material".
_LINKS = (
    (3.0, "0 -.03 -.07", ".3 .3 .05", (("0 0 -.1", "0 0 0", 0.06, "white"),)),
    (3.0, "0 -.07 .03", ".3 .05 .3", (("0 0 -.05", "0 0 .05", 0.06, "dark"), ("0 0 0", "0 -.2 0", 0.055, "white"))),
    (2.0, ".03 .03 -.04", ".1 .1 .05", (("0 0 -.1", "0 0 0", 0.055, "white"), ("0 0 0", ".0825 0 0", 0.05, "white"))),
    (
        2.0,
        "-.03 .03 .02",
        ".1 .05 .1",
        (
            ("0 0 -.05", "0 0 .05", 0.05, "dark"),
            ("-.0825 .08 0", "-.0825 .2 0", 0.05, "white"),
            ("0 0 0", "-.0825 .08 0", 0.05, "white"),
        ),
    ),
    (2.0, "0 .03 -.1", ".1 .1 .03", (("0 0 -.18", "0 0 0", 0.045, "white"),)),
    (1.2, ".05 0 0", ".02 .02 .02", (("0 0 -.04", "0 0 .04", 0.045, "dark"), ("0 0 0", ".088 0 0", 0.04, "white"))),
    (0.7, "0 0 .08", ".01 .01 .005", (("0 0 .03", "0 0 .075", 0.04, "white"),)),
)
_SERVO_STIFFNESS = (4500, 4500, 3500, 3500, 2000, 2000, 2000)


def _quat(matrix: np.ndarray) -> np.ndarray:
    quat = np.zeros(4)
    mujoco.mju_mat2Quat(quat, np.ascontiguousarray(matrix).ravel())
    return quat


def _vec(values: object) -> str:
    return " ".join(f"{value:.8g}" for value in np.asarray(values, dtype=float).ravel())


def _arm_xml() -> str:
    """Nested bodies of the arm; link frames are those of `kinematics.joint_frames`."""
    hand_quat = _vec([np.cos(kin.HAND_YAW / 2), 0, 0, np.sin(kin.HAND_YAW / 2)])
    finger = (
        '<body name="{name}" pos="0 0 .0584" gravcomp="1">'
        '<inertial pos="0 0 .02" mass=".03" diaginertia="1e-5 1e-5 1e-5"/>'
        '<joint name="{name}" type="slide" axis="0 {sign} 0" range="0 {travel}" damping="10" armature=".01"/>'
        '<geom name="{name}" class="pad" type="box" size=".012 .006 .025" pos="0 {offset} .028"/></body>'
    )
    xml = f"""<body name="hand" pos="0 0 {kin.FLANGE_OFFSET}" quat="{hand_quat}" gravcomp="1">
      <inertial pos="0 0 .03" mass=".5" diaginertia=".002 .002 .002"/>
      <geom type="box" size=".026 .075 .026" pos="0 0 .03" material="dark" {_ARM_BITS}/>
      <site name="tcp" pos="0 0 {kin.TCP_OFFSET}" size=".005" rgba="0 0 0 0"/>
      <camera name="wrist" pos=".075 0 .01" xyaxes="0 1 0 .94 0 .34" fovy="70"/>
      {finger.format(name="left_finger", sign=1, travel=FINGER_TRAVEL, offset=0.006)}
      {finger.format(name="right_finger", sign=-1, travel=FINGER_TRAVEL, offset=-0.006)}</body>"""
    for i in reversed(range(kin.NUM_JOINTS)):
        mass, centre, inertia, capsules = _LINKS[i]
        alpha = kin.DH_ALPHA[i]
        position = _vec([kin.DH_A[i], -np.sin(alpha) * kin.DH_D[i], np.cos(alpha) * kin.DH_D[i]])
        quat = _vec([np.cos(alpha / 2), np.sin(alpha / 2), 0, 0])
        geoms = "".join(
            f'<geom type="capsule" fromto="{start} {end}" size="{radius}" material="{material}" {_ARM_BITS}/>'
            for start, end, radius, material in capsules
        )
        xml = f"""<body name="link{i + 1}" pos="{position}" quat="{quat}" gravcomp="1">
          <inertial pos="{centre}" mass="{mass}" diaginertia="{inertia}"/>
          <joint name="joint{i + 1}" axis="0 0 1" range="{kin.JOINT_LOWER[i]} {kin.JOINT_UPPER[i]}"
            damping="1" armature="0.1"/>
          {geoms}{xml}</body>"""
    return xml


def _receptacles_xml() -> str:
    half, wall = RECEPTACLE_HALF_SIZE, BOX_WALL_HEIGHT / 2
    walls = "".join(
        f'<geom name="box_wall{i}" type="box" pos="{_vec(position)}" size="{_vec(size)}" material="box" {_FIXED_BITS}/>'
        for i, (position, size) in enumerate(
            (
                ((half, 0, wall), (0.004, half + 0.004, wall)),
                ((-half, 0, wall), (0.004, half + 0.004, wall)),
                ((0, half, wall), (half + 0.004, 0.004, wall)),
                ((0, -half, wall), (half + 0.004, 0.004, wall)),
            )
        )
    )
    floor = f'type="box" size="{half} {half} .002" pos="0 0 .002" {_FIXED_BITS}'
    return f"""<body name="box"><geom name="box_floor" material="box" {floor}/>{walls}</body>
    <body name="pad"><geom name="pad" material="pad" {floor}/></body>"""


def _objects_xml() -> str:
    # One geom per slot: MuJoCo's bounding-volume tree of a body with several geoms is fixed when the model is compiled.
    return "".join(
        f'<body name="object{slot}" pos="{_vec(PARKED)}"><freejoint/>'
        '<inertial pos="0 0 0" mass=".08" diaginertia="2e-5 2e-5 2e-5"/>'
        f'<geom name="object{slot}" type="box" size=".02 .02 .02" class="object" contype="{OBJECT}" '
        f'conaffinity="{ARM | OBJECT}"/></body>'
        for slot in range(MAX_OBJECTS)
    )


def model_xml(image_size: int) -> str:
    """The world before any scene is loaded into it, as MJCF."""
    servos = "".join(
        f'<position name="servo{i + 1}" joint="joint{i + 1}" kp="{kp}" kv="{kp / 10}" '
        f'ctrlrange="{kin.JOINT_LOWER[i]} {kin.JOINT_UPPER[i]}"/>'
        for i, kp in enumerate(_SERVO_STIFFNESS)
    )
    lines = "".join(
        f'<geom name="line_{side}" type="box" pos="{_vec(position)}" size="{_vec(size)}" '
        'material="line" class="visual"/>'
        for side, position, size in (
            ("left", (0.48, PUSH_LINE["left"], 0.0), (0.22, 0.003, 0.0005)),
            ("right", (0.48, -PUSH_LINE["right"], 0.0), (0.22, 0.003, 0.0005)),
            ("far", (PUSH_LINE["far"], 0.0, 0.0), (0.003, 0.2, 0.0005)),
        )
    )
    return f"""<mujoco model="tabletop">
    <compiler angle="radian" autolimits="true"/>
    <option timestep="{TIMESTEP}" integrator="implicitfast" impratio="10" cone="elliptic" iterations="20"/>
    <visual>
      <quality shadowsize="0" offsamples="0"/><map znear=".005"/>
      <global offwidth="{image_size}" offheight="{image_size}"/>
      <headlight ambient=".35 .35 .35" diffuse=".5 .5 .5" specular="0 0 0"/>
    </visual>
    <default>
      <default class="visual"><geom contype="0" conaffinity="0"/></default>
      <default class="pad">
        <geom friction="1.5 .05 .001" condim="6" solref=".01 1" rgba=".2 .2 .2 1" contype="{ARM}" conaffinity="0"/>
      </default>
      <default class="object"><geom friction=".6 .02 .001" condim="6" solref=".01 1"/></default>
    </default>
    <asset>
      <material name="white" rgba=".9 .9 .9 1" specular="0"/><material name="dark" rgba=".3 .3 .33 1" specular="0"/>
      <material name="table" rgba=".62 .55 .47 1" specular="0"/><material name="line" rgba=".5 .43 .36 1" specular="0"/>
      <material name="box" rgba=".95 .93 .88 1" specular="0"/><material name="pad" rgba=".25 .25 .27 1" specular="0"/>
    </asset>
    <worldbody>
      <light pos=".5 0 2" dir="0 0 -1" diffuse=".3 .3 .3" specular="0 0 0" castshadow="false"/>
      <geom name="table" type="plane" size="0 0 1" friction=".6 .02 .001" rgba="0 0 0 0" {_FIXED_BITS}/>
      <geom name="table_top" type="box" size=".6 .7 .02" pos=".4 0 -.0205" material="table" class="visual"/>{lines}
      <camera name="front" pos="1.1 0 .6" fovy="45"/>
      <geom type="cylinder" size=".08 .07" pos="0 0 .07" material="white" class="visual"/>
      <geom type="capsule" fromto="0 0 .1 0 0 .25" size=".06" material="white" class="visual"/>
      {_arm_xml()}{_receptacles_xml()}{_objects_xml()}
    </worldbody>
    <tendon><fixed name="grip">
      <joint joint="left_finger" coef=".5"/><joint joint="right_finger" coef=".5"/>
    </fixed></tendon>
    <equality><joint joint1="left_finger" joint2="right_finger" solref=".005 1"/></equality>
    <actuator>{servos}
      <position name="gripper" tendon="grip" kp="600" kv="20" ctrlrange="0 {FINGER_TRAVEL}" forcerange="-40 40"/>
    </actuator>
    </mujoco>"""


def object_inertia(item: TableObject) -> tuple[float, np.ndarray]:
    """Mass (kg) and principal inertia (kg m^2) of a uniform solid of `OBJECT_DENSITY`."""
    kind, size = SHAPES[item.shape]
    a, b, c = (item.scale * value for value in size)
    if kind == "box":
        mass = 8 * a * b * c * OBJECT_DENSITY
        return mass, mass / 3 * np.array([b * b + c * c, a * a + c * c, a * a + b * b])
    if kind == "cylinder":  # radius a, half height b
        mass = 2 * np.pi * a * a * b * OBJECT_DENSITY
        across = a * a / 4 + b * b / 3
        return mass, mass * np.array([across, across, a * a / 2])
    mass = 4 / 3 * np.pi * a**3 * OBJECT_DENSITY
    return mass, mass * 0.4 * a * a * np.ones(3)


class World:
    """A `Scene` under physics: state, contacts and object poses. Control lives in `env`, success in `tasks`."""

    def __init__(self, image_size: int) -> None:
        self.model = mujoco.MjModel.from_xml_string(model_xml(image_size))
        self.data = mujoco.MjData(self.model)
        self._object_body = [self.model.body(f"object{i}").id for i in range(MAX_OBJECTS)]
        self._object_geom = [self.model.geom(f"object{i}").id for i in range(MAX_OBJECTS)]
        self._object_qpos = [int(self.model.jnt_qposadr[self.model.body_jntadr[b]]) for b in self._object_body]
        self._object_dof = [int(self.model.jnt_dofadr[self.model.body_jntadr[b]]) for b in self._object_body]
        self._tcp = self.model.site("tcp").id
        self._finger_qpos = int(self.model.joint("left_finger").qposadr[0])
        self._pads = {self.model.geom("left_finger").id, self.model.geom("right_finger").id}
        self.num_objects = 0

    def load(self, scene: Scene) -> None:
        """Write `scene` into the model and reset the physics to its start."""
        model, data = self.model, self.data
        for slot in range(MAX_OBJECTS):
            self._set_object(slot, scene.objects[slot] if slot < len(scene.objects) else None)
        for name in RECEPTACLES:
            position = scene.receptacle_positions.get(name)
            model.body(name).pos = PARKED if position is None else (*position, 0.0)
        self._set_front_camera(scene.front_camera)
        mujoco.mj_setConst(model, data)
        # MuJoCo 4 leaves statistics as compiled: one scales the solver's tolerance, the other clipping planes.
        model.stat.meaninertia = model.dof_M0.mean()
        model.stat.extent = EXTENT
        mujoco.mj_resetData(model, data)
        self.num_objects = len(scene.objects)
        for item, address in zip(scene.objects, self._object_qpos, strict=False):
            resting = item.half_height + 0.001
            data.qpos[address : address + 7] = [
                item.x,
                item.y,
                resting,
                np.cos(item.yaw / 2),
                0,
                0,
                np.sin(item.yaw / 2),
            ]
        data.qpos[:7] = scene.start_q
        data.ctrl[:7] = scene.start_q
        data.qpos[self._finger_qpos : self._finger_qpos + 2] = FINGER_TRAVEL
        data.ctrl[7] = FINGER_TRAVEL
        mujoco.mj_step(model, data, 20)

    def _set_object(self, slot: int, item: TableObject | None) -> None:
        model, body, geom = self.model, self._object_body[slot], self._object_geom[slot]
        if item is None:
            model.geom_contype[geom] = model.geom_conaffinity[geom] = 0
            model.geom_rgba[geom] = 0.0
            model.body_gravcomp[body] = 1.0
            kind, size, mass, inertia = _EMPTY_SLOT
        else:
            model.geom_contype[geom], model.geom_conaffinity[geom] = OBJECT, ARM | OBJECT
            model.geom_rgba[geom] = (*COLOURS[item.colour], 1.0)
            model.body_gravcomp[body] = 0.0
            kind, half_sizes = SHAPES[item.shape]
            size = item.scale * np.array(half_sizes)
            mass, inertia = object_inertia(item)
        extent = {"box": size, "cylinder": size[[0, 0, 1]], "sphere": size[[0, 0, 0]]}[kind]
        radius = {"box": np.linalg.norm(size), "cylinder": np.hypot(size[0], size[1]), "sphere": size[0]}[kind]
        model.geom_type[geom], model.geom_size[geom] = _GEOM_TYPE[kind], size
        model.geom_rbound[geom] = radius
        model.geom_aabb[geom] = np.concatenate([np.zeros(3), extent])
        # Bodies of several geoms (links, the box's walls) meet the object through this copy of its bounds.
        model.bvh_aabb[model.body_bvhadr[body]] = model.geom_aabb[geom]
        model.body_mass[body], model.body_inertia[body] = mass, inertia

    def _set_front_camera(self, pose: CameraPose) -> None:
        backward = np.asarray(pose.position) - np.asarray(pose.target)
        backward = backward / np.linalg.norm(backward)
        right = np.cross([0.0, 0.0, 1.0], backward)
        right = right / np.linalg.norm(right)
        camera = self.model.camera("front")
        camera.pos = pose.position
        camera.quat = _quat(np.stack([right, np.cross(backward, right), backward], axis=1))

    @property
    def q(self) -> np.ndarray:
        """Measured joint angles (7,) in rad."""
        return self.data.qpos[:7].copy()

    @property
    def gripper(self) -> float:
        """Measured opening from 0 (closed) to 1 (open)."""
        return float(self.data.qpos[self._finger_qpos] / FINGER_TRAVEL)

    @property
    def tcp(self) -> tuple[np.ndarray, np.ndarray]:
        """Measured tool-centre position (3,) in m and rotation (3, 3)."""
        return self.data.site_xpos[self._tcp].copy(), self.data.site_xmat[self._tcp].reshape(3, 3).copy()

    def object_pose(self, slot: int) -> tuple[np.ndarray, np.ndarray]:
        """Position (3,) in m and rotation (3, 3) of an object."""
        body = self._object_body[slot]
        return self.data.xpos[body].copy(), self.data.xmat[body].reshape(3, 3).copy()

    def object_speed(self, slot: int) -> float:
        """Linear speed of an object in m/s."""
        dof = self._object_dof[slot]
        return float(np.linalg.norm(self.data.qvel[dof : dof + 3]))

    def held_objects(self) -> set[int]:
        """Slots of the objects that touch a fingertip."""
        held = set()
        for i in range(self.data.ncon):
            pair = (int(self.data.contact.geom[i, 0]), int(self.data.contact.geom[i, 1]))
            for pad, other in (pair, pair[::-1]):
                body = int(self.model.geom_bodyid[other])
                if pad in self._pads and body in self._object_body:
                    held.add(self._object_body.index(body))
        return held
