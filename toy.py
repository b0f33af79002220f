"""A drawn world in which identity, motion, expression, camera and background are independent.

    python toy.py -o toy.png                  # rows: people; columns: the same motions over time
    clip = toy.render(identity=3, motion=7)   # frames, exact masks, boxes and joints: `Clip` and `render`, at the end

Each factor has its own integer seed, so render(A, motion=B) and render(C, motion=B) are one performance by
two people, frame by frame. No camera can record that, and without it "animate A like C" has no ground truth:
real data can only score a model on a person who drives herself.

A person is some thirty round cones (the hull of two spheres) on a skeleton of fifteen bones. Each cone is
cast in closed form into a z-buffer; then every covered pixel is painted once, from its position in its bone's
own coordinates. So cloth patterns stick to the limb, a face leaves the picture when the head turns, and who
hides whom is geometry, not a rule.

World: x right, y up, z towards the viewer, ground at y = 0; one unit is the height of an average person.
Image: x right, y down, z towards the viewer, in pixels; (0, 0) is the centre of the top left pixel.
Left and right are the person's own; angles are in degrees. T frames, P cones, N painted pixels, J joints.
"""
import colorsys
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np

from video import Parser, check_output, write_gif, write_image, write_video

FPS = 24
DRAWN = "AI-generated: drawn figures"
SUPER = 3       # people are drawn at SUPER x the frame size and averaged: nine samples a pixel
FACTORS = ("identity", "motion", "expression", "camera", "background")


def factor_rng(seed: int, factor: str) -> np.random.Generator:
    """One generator per (seed, factor), so that equal seeds of two factors share nothing"""
    return np.random.default_rng([seed, FACTORS.index(factor)])


def rgb(text: str) -> np.ndarray:
    """'ff8000 ...' -> (K,3) in [0,1]"""
    return np.array([list(bytes.fromhex(word)) for word in text.split()]) / 255


# ---- Identity: a wardrobe, proportions, and the cones they make --------------------------------------------

SIDES = (("right", -1), ("left", 1))          # a person who faces the viewer has the left hand at +x
BONES = ("hips", "chest", "head") + tuple(f"{side}_{bone}" for side, _ in SIDES for bone in
                                          ("upper_arm", "forearm", "hand", "thigh", "shank", "foot"))
BONE = {name: index for index, name in enumerate(BONES)}
FEET = [BONE["left_foot"], BONE["right_foot"]]
THIGH = .225                                             # of an average person; the shank is as long
SOLE = np.array([(0, -.05, -.04), (0, -.05, .09)])       # heel and toe of a shoe, in foot coordinates

JOINTS = ("nose", "neck", "right_shoulder", "right_elbow", "right_wrist", "left_shoulder", "left_elbow",
          "left_wrist", "right_hip", "right_knee", "right_ankle", "left_hip", "left_knee", "left_ankle",
          "right_eye", "left_eye", "right_ear", "left_ear",      # so far OpenPose's order
          "right_hand", "left_hand", "right_toe", "left_toe")
JOINT_BONE = [2, 1, 3, 4, 5, 9, 10, 11, 6, 7, 8, 12, 13, 14, 2, 2, 2, 2, 5, 11, 8, 14]    # indices into BONES
DEPTH = np.array([.05, .08, *[.08, .065, .065] * 2, *[.12, .08, .065] * 2, *[.05] * 8])     # below the skin

SKIN = rgb("f7d9c0 f0c6a0 e3ae84 d39b70 bd8259 a46b45 875236 6a3f2a 50301f 3c251b")
HAIR = rgb("1e1a20 33211a 54341f 7a4626 a8552b c98a3f e2c27d 8f8d92 d9d6d2 2f7f86 c85a86 6a4fa3")
CLOTH = rgb("e4572e f28482 e9b44c f6d55c 8a9a3b 5fa55a 2f6b4f 8fd3b6 2a9d8f 3fb8c4 6fb7e9 3a7bd5 27406e "
            "4d4aa8 7d5ba6 b79ced c86bb0 c2335b f4a6b8 a8432f 6b4632 d9bf94 55647a 33363f f3ead7")
MATERIALS = ("skin", "hair", "top", "bottom", "shoes", "accent")
PATTERNS = {        # (u, v) around and along the limb, in periods of the cloth -> share of the second colour
    "plain": lambda u, v: 0 * u,
    "hoops": lambda u, v: v % 1 < .5,
    "stripes": lambda u, v: u % 1 < .5,
    "diagonal": lambda u, v: (u + v) % 1 < .5,
    "checks": lambda u, v: .5 * (u % 1 < .5) + .5 * (v % 1 < .5),
    "dots": lambda u, v: ((u + .5 * (v % 2 < 1)) % 1 - .5) ** 2 + (v % 1 - .5) ** 2 < .085,
}


@dataclass(frozen=True)
class Person:
    tall: float            # height against the average; all lengths below are for an average height
    style: dict            # hair, outfit, patterns, ... in words
    palette: dict          # material, or the second colour of its pattern ("top2") -> (3,) RGB in [0,1]
    skull: tuple           # height of the skull's centre above the neck, radius
    offsets: np.ndarray    # (bones,3) origin of a bone in its parent's coordinates
    joints: np.ndarray     # (J,3) in the coordinates of JOINT_BONE
    bone: np.ndarray       # (P,2) the bones that hold the ends of a cone
    ends: np.ndarray       # (P,2,3) the ends, in those bones' coordinates
    radii: np.ndarray      # (P,2)
    material: np.ndarray   # (P,) index into MATERIALS
    flat: np.ndarray       # (P,) squash factor <= 1 along ...
    axis: np.ndarray       # (P,) ... this axis of the first bone
    clip: np.ndarray       # (P,4) keeps the points of the first bone with xyz . clip[:3] <= clip[3]


def draw_wardrobe(rng: np.random.Generator) -> tuple[dict, dict]:
    """-> style, palette"""
    def pick(words):
        return rng.choice(words.split())

    def cloth():
        main, other = (CLOTH[rng.choice(25, 2, replace=False)] * rng.uniform(.93, 1.05, (2, 3))).clip(0, 1)
        second = (rgb("fbf5e9")[0], .5 * main, other)[rng.choice(3, p=(.5, .25, .25))]
        return main, .5 * main + .5 * second

    style = dict(outfit=pick("trousers trousers shorts skirt dress overalls"),
                 sleeves=pick("none short short long long"),
                 hair=pick("short short bob long bun ponytail afro bald cap beanie"),
                 top=rng.choice(list(PATTERNS), p=(.1, .2, .15, .15, .2, .2)),
                 bottom=rng.choice(list(PATTERNS), p=(.45, .05, .15, .1, .15, .1)),
                 beard=rng.random() < .18, glasses=rng.random() < .15, boots=rng.random() < .3,
                 parting=rng.uniform(-.35, .35), hem=rng.uniform(.11, .2), period=rng.uniform(.09, .13))
    style["beard"] &= style["hair"] not in ("bob", "long")
    if style["outfit"] == "overalls":
        style["bottom"] = "plain"
    shade = rng.uniform(0, len(SKIN) - 1)
    skin = SKIN[int(shade)] + shade % 1 * (SKIN[int(shade) + 1] - SKIN[int(shade)])
    hair = HAIR[rng.choice(12, p=(.16,) * 3 + (.07,) * 6 + (.04, .03, .03))] * rng.uniform(.85, 1.1)
    if np.abs(hair - skin).max() < .22:                  # a hairline must show
        hair = .35 * hair
    palette = dict(skin=skin, hair=hair, shoes=cloth()[0], accent=cloth()[0])
    for name in ("top", "bottom"):
        palette[name], other = cloth()
        palette[name + "2"] = palette[name] if style[name] == "plain" else other
    if style["outfit"] == "dress":
        style["bottom"], palette["bottom"], palette["bottom2"] = style["top"], palette["top"], palette["top2"]
    return style, palette


def hair_cones(style: dict) -> list[tuple]:
    """Ends, radii, material, squash, its axis and clip, in skull radii from the skull's centre"""
    shell = ((0, .04, -.06), (0, -.15, -.09), 1.11, 1.07, "hair", 1, 2, (style["parting"], -.48, .82, .29))
    hat = ((0, .12, -.03), (0, .12, -.06), 1.17, 1.14, "accent", 1, 2, (0, -1, .25, -.1))
    tail = ((0, .45, -1), (0, -.9, -1.4), .42, .2, "hair")
    return dict(
        bald=[], short=[shell], afro=[((0, .5, -.5), (0, .35, -.5), 1.35, 1.35, "hair")],
        bob=[shell, ((0, -.1, -.12), (0, -.75, -.18), 1.16, 1.12, "hair", 1, 2, (0, .1, 1, .2))],
        long=[shell, ((0, -.1, -.2), (0, -2.1, -.55), 1.12, .85, "hair", .75, 2, (0, 0, 1, .1))],
        bun=[shell, ((0, 1.05, -.45), (0, 1.1, -.45), .5, .45, "hair")],
        ponytail=[shell, tail, ((0, .5, -.9), (0, .45, -1), .3, .35, "accent")],
        cap=[shell, hat, ((0, .32, .55), (0, .24, 1.15), .72, .55, "accent", .16, 1)],
        beanie=[shell, hat, ((0, 1.5, -.1), (0, 1.5, -.1), .3, .3, "accent")])[style["hair"]]


def limb_cones(style: dict, leg: float, heavy: float, s: int) -> list[tuple]:
    """Bone, ends, radii, material, ... of the arm and leg on side s; leg is the length of a thigh"""
    below = lambda y: (0, -1, 0, y)                      # clips what hangs lower: a hem, a cuff, a sole
    arm, fore, hand, thigh, shank, foot = BONES[3:9] if s < 0 else BONES[9:]
    outfit, sleeves = style["outfit"], style["sleeves"]
    cloth = "bottom" if outfit in ("trousers", "overalls") else "skin"
    cones = [(arm, (0, 0, 0), (0, -.145, 0), .037, .031, "top" if sleeves == "long" else "skin"),
             (fore, (0, 0, 0), (0, -.13, 0), .031, .025, "skin"),
             (hand, (0, -.012, 0), (0, -.046, .004), .027, .022, "skin", .65, 0),
             (hand, (0, -.012, .018), (0, -.036, .03), .011, .01, "skin"),
             (thigh, (0, -.08 if cloth == "skin" else -.02, 0), (0, -leg, 0), .06 * heavy, .047, cloth, .95),
             (shank, (0, 0, 0), (0, .01 - leg, 0), .044, .029, "skin"),
             (foot, (0, -.022, -.012), (0, -.03, .075), .036, .031, "shoes", 1, 2, below(.05))]
    if sleeves == "long":
        cones += [(fore, (0, 0, 0), (0, -.13, 0), .0315, .032, "top", 1, 2, below(.122))]
    if sleeves == "short":
        cones += [(arm, (0, 0, 0), (0, -.09, 0), .045, .045, "top", 1, 2, below(.085))]
    if cloth == "bottom":
        cones += [(shank, (0, 0, 0), (0, -leg, 0), .0475, .046, cloth, 1, 2, below(leg - .022))]
    if outfit == "shorts":
        cones += [(thigh, (0, -.035, 0), (0, -.16, 0), .067 * heavy, .065, "bottom", 1, 2, below(.13))]
    if outfit in ("skirt", "dress"):
        flare = (-s * .015, -.03, 0), (0, -.22, 0), .07 * heavy, .112
        cones += [(thigh, *flare, "bottom", .9, 2, below(style["hem"]))]
    if style["boots"]:
        cones += [(shank, (0, .07 - leg, 0), (0, -leg, 0), .044, .04, "shoes", 1, 2, (0, 1, 0, .09 - leg))]
    return cones


def make_person(seed: int) -> Person:
    """Proportions, clothes and hair of identity `seed`, as cones on bones"""
    rng = factor_rng(seed, "identity")
    tall, heavy, leg, wide, skull = rng.uniform((.93, .86, .92, .86, .92), (1.06, 1.28, 1.08, 1.14, 1.14))
    style, palette = draw_wardrobe(rng)
    leg, wide, R = THIGH * leg, .098 * wide * heavy ** .4, float(.092 * skull)       # R: radius of the skull
    skull_y, cones = .03 + R, []                         # skull_y: the skull's centre above the neck

    def cone(bone, a, b, ra, rb, material, flat=1., axis=2, clip=(0, 0, 0, 1), to=None):
        ends = (BONE[bone], BONE[to or bone]), (a, b), (ra, rb)
        cones.append((*ends, MATERIALS.index(material), flat, axis, clip))

    def head_cone(a, b, ra, rb, material, flat=1., axis=2, clip=(0, 0, 0, 9)):
        a, b = ((x * R, skull_y + y * R, z * R) for x, y, z in (a, b))
        cone("head", a, b, ra * R, rb * R, material, flat, axis, (*clip[:3], clip[3] * R + clip[1] * skull_y))

    trunk, hem = ("bottom", (0, 0, 0, 1)) if style["outfit"] == "overalls" else ("top", (0, -1, 0, -.002))
    cone("hips", (-.03, -.008, 0), (.03, -.008, 0), .068 * heavy, .068 * heavy, "bottom", .9)
    cone("hips", (0, -.015, 0), (0, .04, 0), .104 * heavy, .073 * heavy, trunk, .76, 2, hem, to="chest")
    cone("chest", (0, .03, 0), (0, .14, 0), .073 * heavy, .086 * heavy, "top", .68)
    cone("chest", (.008 - wide, .172, 0), (wide - .008, .172, 0), .046, .046, "top", .95)
    if heavy > 1.12:
        cone("chest", (0, .01, .02), (0, .03, .02), .075 * heavy, .07 * heavy, trunk, .85)
    cone("chest", (0, .17, -.004), (0, skull_y - .3 * R, 0), .036, .034, "skin", to="head")
    head_cone((0, 0, 0), (0, -.5, .1), 1, .8, "skin")
    head_cone((0, -.3, .96), (0, -.3, 1), .14, .15, "skin")                  # nose
    for args in hair_cones(style):
        head_cone(*args)
    offsets = [(0, 0, 0), (0, .08, 0), (0, .22, 0)]
    for _, s in SIDES:
        head_cone((s * .97, -.3, -.05), (s, -.15, -.08), .2, .22, "skin", .6, 0)
        for args in limb_cones(style, leg, heavy, s):
            cone(*args)
        offsets += [(s * wide, .175, 0), (0, -.145, 0), (0, -.13, 0)]
        offsets += [(s * .05 * heavy ** .5, -.01, 0), (0, -leg, 0), (0, -leg, 0)]
    joints = np.zeros((len(JOINTS), 3))                  # most are the origins of their bones
    joints[:2] = (0, skull_y - .3 * R, 1.1 * R), (0, .2, 0)
    joints[14:18] = [(x * R, skull_y + y * R, z * R) for x, y, z in
                     ((-.4, -.12, .9), (.4, -.12, .9), (-1, -.25, 0), (1, -.25, 0))]
    joints[18:] = [(0, -.04, 0)] * 2 + [(0, -.03, .09)] * 2
    return Person(tall, style, palette, (skull_y, R), np.array(offsets), joints, *map(np.array, zip(*cones)))


# ---- Motion: a score of key poses, then forward kinematics -------------------------------------------------

ARMS = {            # swing forward, raise sideways, twist of the upper arm, elbow
    "down": (6, 14, 0, 14), "back": (-26, 12, 0, 16), "fore": (28, 12, 0, 30), "front": (86, 6, 0, 8),
    "side": (0, 88, 30, 10), "up": (0, 163, 60, 12), "high": (165, 6, 0, 8), "hip": (-22, 46, -68, 98),
    "wave_in": (0, 100, 85, 112), "wave_out": (0, 98, 85, 48), "head": (12, 128, 80, 123),
    "bend": (30, 30, 20, 60), "open": (50, 34, -40, 50), "clap": (62, -4, -30, 40), "point": (0, 148, 0, 6),
    "across": (36, -18, -20, 14), "cactus": (0, 82, 90, 90), "hook": (0, 82, -90, 90), "low": (0, 55, 0, 6),
    "flexed": (0, 90, 88, 128), "guard": (24, 22, -10, 128), "fist": (20, 40, 0, 80), "ahead": (42, 90, 0, 6),
    "raised": (0, 125, 0, 6), "behind": (-34, 90, 0, 6), "dip": (0, 30, 0, 20), "flap": (0, 112, 40, 30)}
UPPER = {           # the beats of a bar, repeated to four: left arm, right arm, then waist bend, lean, twist
    "hang": "down down", "swing": "back fore 3 0 8, down down 3, fore back 3 0 -8, down down 3",
    "raise": "down down, side side, up up, side side", "clap": "open open, clap clap 4",
    "circles": "low low, ahead ahead, raised raised, behind behind", "bow": "down down, fore fore 62",
    "wave": "down wave_out 0 3, down wave_in 0 3", "on_hips": "hip hip 0 7, hip hip 0 -7",
    "wave_both": "wave_out wave_in 0 5, wave_in wave_out 0 -5", "both_on_head": "bend bend, head head 4",
    "touch_head": "down bend, down head 0 -6", "reach_out": "bend bend, front front 8",
    "reach_up": "high down 0 -9, bend bend 4, down high 0 9, bend bend 4",
    "disco": "point hip 0 -6 -14, across hip 10 8 22", "flex": "side side, flexed flexed -3",
    "robot": "cactus hook 0 0 6, hook cactus 0 0 -6", "punch": "front guard 4 0 -16, guard front 4 0 16",
    "wings": "dip dip 0 6, flap flap 0 -6", "twist": "fist fist 6 0 30, fist fist 6 0 -30"}
LEG_POSES = {       # swing forward, spread sideways, knee
    "stand": (0, 4, 3), "lift": (42, 5, 72), "out": (0, 10, 5), "in": (6, -2, 16), "apart": (2, 9, 5),
    "squat": (74, 16, 102), "hop": (6, 14, 14), "wide": (2, 25, 5), "contact": (15, 3, 18),
    "under": (-11, 3, 7), "push": (-4, 3, 41), "pass": (48, 3, 70), "lunge": (60, 5, 74),
    "trail": (-24, 4, 30), "plant": (-6, 4, 4), "step": (46, 5, 62), "kick": (78, 6, 10), "brace": (4, 2, 10),
    "aside": (0, 48, 8), "soft": (12, 8, 22), "crouch": (34, 30, 62), "lean": (0, 34, 3), "even": (0, 18, 3)}
LEGS = {            # left leg, right leg, then a hop in hundredths of a unit
    "stand": "stand stand", "sway": "out in, stand stand, in out, stand stand",
    "bounce": "soft soft, apart apart", "step": "stand stand, lift stand, stand stand, stand lift",
    "squat": "apart apart, squat squat", "walk": "contact push, under pass, push contact, pass under",
    "jack": "stand stand, hop hop 6, wide wide, hop hop 6",
    "kick": "stand stand, kick brace, stand stand, brace kick",
    "lunge": "stand stand, step plant, lunge trail, step plant",
    "side_kick": "stand stand, aside brace, stand stand, brace aside",
    "side_lunge": "even even, crouch lean, even even, lean crouch"}
MOTIONS = {         # legs, upper body and facing to choose from; seconds a beat
    "walk in place": ("step", "swing", "any", (.28, .45)),
    "walk around": ("walk", "swing wave on_hips raise", "circle", (.24, .36)),
    "wave": ("stand sway bounce", "wave wave_both", "any", (.2, .4)),
    "jumping jack": ("jack", "raise", "any", (.2, .32)),
    "squat": ("squat", "reach_out on_hips clap both_on_head", "any", (.45, .8)),
    "full turn": ("step", "hang swing on_hips raise circles", "turn", (.25, .4)),
    "arm circles": ("stand sway bounce", "circles wings", "any", (.22, .4)),
    "kick": ("kick side_kick", "punch on_hips wings", "any", (.35, .55)),
    "lunge": ("lunge side_lunge", "on_hips raise reach_up", "any", (.4, .65)),
    "touch head": ("stand sway", "touch_head both_on_head", "any", (.4, .7)),
    "reach": ("stand sway bounce", "reach_up reach_out", "any", (.35, .6)),
    "bow": ("stand", "bow", "any", (.7, 1.1)),
    "dance": ("sway bounce step squat jack lunge side_lunge kick side_kick",
              "disco robot flex twist wings clap punch raise wave_both circles reach_up", "any any turn",
              (.25, .42))}
OFTEN = {"dance": 3, "full turn": 3, "walk around": 2}           # weights; the others have 1


def score_keys(score: str, poses: dict, extras: int) -> np.ndarray:
    """One bar of a score -> key poses (4, left + right + extras)"""
    rows = []
    for left, right, *more in map(str.split, score.split(",")):
        rows.append([*poses[left], *poses[right], *map(float, more)] + [0.] * (extras - len(more)))
    return np.tile(rows, (4 // len(rows), 1))


def spline(keys: np.ndarray, beat: np.ndarray) -> np.ndarray:
    """Periodic Catmull-Rom curve through keys (K,C) at times beat (T,) -> (T,C)"""
    i, t = np.floor(beat).astype(int), (beat % 1)[:, None]
    p0, p1, p2, p3 = (keys[(i + k) % len(keys)] for k in (-1, 0, 1, 2))
    return p1 + t / 2 * (p2 - p0 + t * (2 * p0 - 5 * p1 + 4 * p2 - p3 + t * (3 * (p1 - p2) + p3 - p0)))


def rotation(axis: int, degrees) -> np.ndarray:
    """(...) -> (...,3,3), right-handed about x, y or z (0, 1, 2)"""
    radians, i, j = np.deg2rad(np.asarray(degrees, float)), (axis + 1) % 3, (axis + 2) % 3
    out = np.zeros(radians.shape + (3, 3))
    out[..., axis, axis] = 1
    out[..., i, i] = out[..., j, j] = np.cos(radians)
    out[..., j, i] = np.sin(radians)
    out[..., i, j] = -out[..., j, i]
    return out


def leg_frames(legs: np.ndarray) -> np.ndarray:
    """Leg angles (T,7) -> frames (T,2,3,3,3) of thigh, shank and foot, left then right, seen from the hips"""
    frames = []
    for s, (swing, spread, knee) in ((1, legs[:, 0:3].T), (-1, legs[:, 3:6].T)):
        thigh = rotation(2, s * spread) @ rotation(0, -swing)
        drop = .8 * np.maximum(knee - swing - 18, 0)     # the toes hang once the shank tilts back
        frames.append([thigh, thigh @ rotation(0, knee), rotation(1, 14 * s) @ rotation(0, drop)])
    return np.moveaxis(np.array(frames), 2, 0)


def footwork(keys: np.ndarray, samples: int = 12) -> tuple[np.ndarray, float]:
    """How planted feet push an average body: leg keys (K,7) -> way (K samples,2) in x, z; drift in z a beat

    What touches the ground stays, so the hips move by minus the motion of heels and toes, weighted by how low
    they are. The sum over the cycle is the drift (only a walk has some); `way` is the rest, and periodic.
    """
    frames = leg_frames(spline(keys, np.arange(samples * len(keys)) / samples))
    ankles = -THIGH * (frames[:, :, 0, :, 1] + frames[:, :, 1, :, 1])
    soles = (ankles[:, :, None] + np.einsum("tfij,kj->tfki", frames[:, :, 2], SOLE)).reshape(-1, 4, 3)
    weight = np.exp((soles[..., 1].min(1, keepdims=True) - soles[..., 1]) / .01)
    weight = weight + np.roll(weight, -1, 0)
    weight /= weight.sum(1, keepdims=True)
    step = ((soles - np.roll(soles, -1, 0)) * weight[..., None]).sum(1)[:, [0, 2]]
    way = np.cumsum(step, 0) - step - step.mean(0) * np.arange(len(step))[:, None]
    return way - way.mean(0), step[:, 1].mean() * samples


def motion_pose(seed: int, seconds: np.ndarray) -> dict:
    """-> name, legs (T,7), upper (T,11), head (T,3), yaw (T,), path (T,2): the same for every body"""
    rng = factor_rng(seed, "motion")
    weights = np.array([OFTEN.get(name, 1) for name in MOTIONS])
    name = rng.choice(list(MOTIONS), p=weights / weights.sum())
    legs, upper, facing, tempo = MOTIONS[name]
    bars, beat = 4 if name == "dance" else 1, seconds / (1.4 * rng.uniform(*tempo)) + rng.uniform(0, 16)
    legs, upper = rng.choice(legs.split(), bars), rng.choice(upper.split(), bars)
    legs = np.concatenate([score_keys(LEGS[bar], LEG_POSES, 1) for bar in legs])
    upper = np.concatenate([score_keys(UPPER[bar], ARMS, 3) for bar in upper])
    swell = rng.uniform(-.2, .1)                         # gestures larger or smaller than written
    legs += swell * (legs - score_keys(LEGS["stand"], LEG_POSES, 1)[0])
    upper += swell * (upper - score_keys(UPPER["hang"], ARMS, 3)[0])
    if rng.random() < .5:                                # mirrored
        legs = legs[:, [3, 4, 5, 0, 1, 2, 6]]
        upper = upper[:, [4, 5, 6, 7, 0, 1, 2, 3, 8, 9, 10]] * ([1] * 9 + [-1, -1])
    way, drift = footwork(legs)
    path = spline(way, beat * len(way) / len(legs))
    legs, upper = spline(legs, beat), spline(upper, beat)
    legs[:, [2, 5, 6]] = np.maximum(legs[:, [2, 5, 6]], 0)       # a spline overshoots, a knee does not

    def idle(size, slow):
        return size * np.sin(2 * np.pi * (seconds / rng.uniform(slow, 2 * slow) + rng.random()))

    head = np.stack([idle(7, 1.5) - .45 * upper[:, 8], idle(7, 1.5), idle(18, 1.8)], 1)      # nod, tilt, turn
    upper[:, 8:] += np.stack([idle(2, 2), idle(2, 2), idle(4, 2)], 1)
    sign, start, facing = rng.choice([-1, 1]), rng.uniform(-180, 180), rng.choice(facing.split())
    if facing == "any":                                  # mostly towards us, sometimes away
        aside = (rng.normal(0, 12), rng.uniform(25, 80), rng.uniform(135, 225))[rng.choice(3, p=(.6, .3, .1))]
        yaw = sign * aside + idle(rng.uniform(4, 28), 2)
    if facing == "turn":
        yaw = start + sign * 360 * seconds / rng.uniform(1.8, 3.6)
    if facing == "circle":                               # as far round as the steps carry
        radius = rng.uniform(.2, .25)
        yaw = start + sign * np.rad2deg((path[:, 1] + drift * beat) / radius)
        path = sign * radius * np.stack([-np.cos(np.deg2rad(yaw)), np.sin(np.deg2rad(yaw))], 1)
    else:
        path = np.einsum("tij,tj->ti", rotation(1, yaw)[:, ::2, ::2], path)
    return dict(name=name, legs=legs, upper=upper, head=head, yaw=yaw, path=path)


def pose_skeleton(person: Person, pose: dict) -> tuple[np.ndarray, np.ndarray]:
    """-> frames (T,bones,3,3), whose columns are the bones' axes in the world, and origins (T,bones,3)"""
    legs, upper, (nod, tilt, turn) = pose["legs"], pose["upper"], pose["head"].T
    frames, at = np.empty((len(legs), len(BONES), 3, 3)), np.zeros((len(legs), len(BONES), 3))

    def attach(bone, parent, frame):
        frames[:, bone], at[:, bone] = frame, at[:, parent] + frames[:, parent] @ person.offsets[bone]

    frames[:, 0] = hips = rotation(1, pose["yaw"])
    attach(1, 0, hips @ rotation(0, upper[:, 8]) @ rotation(2, upper[:, 9]) @ rotation(1, upper[:, 10]))
    attach(2, 1, frames[:, 1] @ rotation(1, turn) @ rotation(0, nod) @ rotation(2, tilt))
    local = leg_frames(legs)
    for side, s in SIDES:
        arm, thigh = BONE[f"{side}_upper_arm"], BONE[f"{side}_thigh"]
        swing, lift, twist, elbow = upper[:, 0:4].T if s > 0 else upper[:, 4:8].T
        attach(arm, 1, frames[:, 1] @ rotation(2, s * lift) @ rotation(0, -swing) @ rotation(1, s * twist))
        attach(arm + 1, arm, frames[:, arm] @ rotation(0, -elbow))
        attach(arm + 2, arm + 1, frames[:, arm + 1])
        for k in range(3):
            attach(thigh + k, thigh + k - 1 if k else 0, hips @ local[:, int(s < 0), k])
    low = (at[:, FEET, None] + np.einsum("tfij,kj->tfki", frames[:, FEET], SOLE))[..., 1].min((1, 2))
    path = pose["path"] * -person.offsets[FEET[0], 1] / THIGH
    at += np.stack([path[:, 0], legs[:, 6] / 100 - low, path[:, 1]], 1)[:, None]     # the lower foot stands
    return frames, at


# ---- Expression, camera, background ------------------------------------------------------------------------

def expression_track(seed: int, seconds: np.ndarray) -> dict[str, np.ndarray]:
    """-> blink and mouth in [0,1]; smile, brow and gaze in [-1,1]; each (T,)"""
    rng = factor_rng(seed, "expression")

    def wave(low, high, fastest):
        turns = seconds * fastest * rng.uniform(.3, 1) + rng.random()
        return low + (high - low) * (.5 + .5 * np.sin(2 * np.pi * turns))

    mouth = wave(0, 1, 2.6) * wave(*((0, .2), (.2, 1), (.6, 1), (.1, .7))[rng.integers(4)], .8)
    smile, brow, gaze = wave(*np.sort(rng.uniform(-.4, 1, 2)), .5), wave(-.4, 1, .9), wave(-1, 1, .6)
    period, phase = rng.uniform(1.1, 2.6), rng.random()
    blink = np.clip(1.6 - np.abs((seconds / period + phase) % 1 - .5) * period / .07, 0, 1)
    return dict(blink=blink, mouth=mouth, smile=smile, brow=brow, gaze=gaze)


def camera_track(seed: int, seconds: np.ndarray, height: int, width: int) -> dict:
    """-> unit (pixels a unit), feet (x, y), tilt; zoom (T,) about the frame's centre and pan (T,2) pixels"""
    rng = factor_rng(seed, "camera")
    side = min(height, 1.25 * width)
    if rng.random() < .1:                                # a close-up, cut at the thighs
        scale = rng.uniform(1.2, 1.45)
        feet = height * rng.uniform(.06, .12) + 1.03 * scale * side
    else:
        scale = rng.uniform(.77, .86)
        feet = height * rng.uniform(.955, .975)
    x, moves, rate, phase = rng.uniform(.42, .58), rng.random(2) < .3, 1 / rng.uniform(4, 8), rng.random(2)
    sway = .05 * moves * np.sin(2 * np.pi * (seconds[:, None] * rate + phase))
    return dict(unit=scale * side, feet=np.array([width * x, feet]) - .5, tilt=rng.uniform(4, 13),
                zoom=1 + sway[:, 0], pan=sway[:, 1:] * (width, 0))


def draw_background(seed: int, height: int, width: int) -> np.ndarray:
    """(1.25 H, 1.25 W, 3) float32 RGB in [0,1]; the margin is for a camera that moves"""
    rng = factor_rng(seed, "background")
    kind = rng.choice("studio room meadow stripes bokeh bricks".split())
    hue, bright = rng.random(), rng.uniform(.62, .95)
    scale = 2.5 * min(height, width)                     # drawn at twice the size
    y, x = np.mgrid[:int(2.5 * height), :int(2.5 * width)].astype(np.float32) / np.float32(scale)
    W, H = x.max(), y.max()
    horizon = H * rng.uniform(.62, .72)

    def tone(shift, saturation, value):
        return np.array(colorsys.hsv_to_rgb((hue + shift) % 1, saturation, min(value, 1)), np.float32)

    def mix(a, b, share):
        return a + (b - a) * np.asarray(share, np.float32)[..., None]

    image = mix(tone(0, .18, bright), tone(.05, .3, bright * .82), y / H)
    if kind == "studio":
        image = mix(image, tone(0, .08, bright * 1.1), np.exp(-6 * ((x - W / 2) ** 2 + (y - .4) ** 2)))
    if kind == "bokeh":
        image *= .72
        for cx, cy, size, shift in rng.uniform((0, 0, .02, -.12), (W, H, .1, .12), (16, 4)):
            cx, cy, size = (round(scale * float(length)) for length in (cx, cy, size))
            disc = cv2.circle(image.copy(), (cx, cy), size, tone(shift, .35, 1).tolist(), -1)
            image = cv2.addWeighted(image, .65, disc, .35, 0)
    if kind == "meadow":
        white, sky, hill, grass, lawn = rgb("ffffff 9cc9e8 8fbf83 a9d08a 7fb56b").astype(np.float32)
        image = mix(white, sky, np.clip(1 - y / horizon, 0, 1) ** .7)
        for cx, cy, size in rng.uniform((0, .15 * H, .06), (W, .4 * H, .12), (3, 3)):
            for k in (-1, 0, 1):
                puff = ((x - cx - k * size) / 1.3) ** 2 + (y - cy) ** 2
                image[puff < (size * (.75 - .25 * abs(k))) ** 2] = white
        image = mix(image, hill, y > horizon - .04 + .05 * np.sin(x * rng.uniform(4, 8) + rng.uniform(0, 6)))
        image = mix(image, mix(grass, lawn, y), y > horizon)
    if kind == "stripes":
        wall = (x * rng.uniform(4, 9) + rng.choice([0, 4]) * y) % 1 < .5
        image = mix(image, tone(0, .26, bright * .88), wall)
    if kind == "bricks":
        row, column = np.floor(y * 14), x * 7 + .5 * (np.floor(y * 14) % 2)
        share = (np.floor(column) * 7 + row * 13) % 5 / 5
        image = mix(tone(0, .3, bright * .85), tone(.02, .34, bright * .78), share)
        image = mix(image, tone(0, .12, bright * .95), ((y * 14) % 1 < .12) | (column % 1 < .06))
    if kind == "room":
        frame = np.maximum(abs(x - W * rng.uniform(.2, .8)) / .12, abs(y - .25 * H) / .14)
        image = mix(mix(image, tone(.1, .25, bright * .7), frame < 1), tone(.55, .25, bright), frame < .85)
    if kind in ("room", "stripes", "bricks"):
        floor = mix(tone(.5, .22, bright * .72), tone(.5, .2, bright * .86), (y - horizon) / (H - horizon))
        image = mix(mix(image, floor, y > horizon), tone(0, .1, bright * 1.08), abs(y - horizon) < .012)
    return cv2.resize(image, (int(1.25 * width), int(1.25 * height)), interpolation=cv2.INTER_AREA)


# ---- Drawing a person --------------------------------------------------------------------------------------

def project_cones(person: Person, frames: np.ndarray, at: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """Frames (T,bones,3,3), origins (T,bones,3), unit (T,) in image space -> what `cast_cone` reads, (T,P,20)

    A squashed cone is the hull of ellipsoids with matrix 1 + (s^2 - 1) c c', c the squash axis. Along z, its
    outline is that of a round cone in the coordinates (1 + stretch c c') p, and its depth is the round one's
    times `thin`, sheared by `lean`. So flat parts cost no more than round ones.
    """
    first, second = person.bone.T
    unit = unit[:, None, None]
    a = np.einsum("tpij,pj->tpi", frames[:, first], person.ends[:, 0]) + at[:, first]
    b = np.einsum("tpij,pj->tpi", frames[:, second], person.ends[:, 1]) + at[:, second]
    d = b - a
    c = np.take_along_axis(frames[:, first], person.axis[None, :, None, None], 3)[..., 0] / unit
    c, cz, gamma = c[..., :2], c[..., 2:], (person.flat ** 2 - 1)[:, None]
    m = (c ** 2).sum(-1, keepdims=True) + 1e-9
    stretch = (1 / np.sqrt(1 + gamma * m) - 1) / m
    lean = gamma * cz / (1 + gamma * m) * c
    thin = person.flat[:, None] / np.sqrt(1 + gamma * m)
    along = d[..., :2] + stretch * (c * d[..., :2]).sum(-1, keepdims=True) * c
    rise = d[..., 2:] - (lean * d[..., :2]).sum(-1, keepdims=True)
    normal = np.einsum("tpij,pj->tpi", frames[:, first], person.clip[:, :3]) / unit
    limit = person.clip[:, 3:] * unit - (normal * (a - at[:, first])).sum(-1, keepdims=True)
    radii = person.radii * unit
    return np.concatenate([a, b[..., :2], radii, along, rise, stretch, c, lean, thin, normal, limit], -1)


def cast_cone(depth: np.ndarray, label: np.ndarray, index: int, numbers: list, clipped: bool) -> None:
    """Z-buffer one cone, the upper envelope of spheres with centre a + t d and radius r(t), t in [0,1]:

        z(t) = a_z + t d_z + sqrt(q), q = r(t)^2 - |p - t d|^2 = n (D - (t - B)^2), n = |d|^2 - (r_b - r_a)^2

    is largest at t = B + d_z sqrt(D / (n + d_z^2)), clamped. Off the cone q < 0: NaN, which never wins.
    """
    ax, ay, az, bx, by, ra, rb, ux, uy, rise, stretch, cx, cy, lx, ly, thin, nx, ny, nz, limit = numbers
    H, W = depth.shape
    x0, x1 = max(int(min(ax - ra, bx - rb)), 0), min(int(max(ax + ra, bx + rb)) + 2, W)
    y0, y1 = max(int(min(ay - ra, by - rb)), 0), min(int(max(ay + ra, by + rb)) + 2, H)
    if x0 >= x1 or y0 >= y1:
        return
    x = np.arange(x0, x1, dtype=np.float32) - np.float32(ax)
    y = np.arange(y0, y1, dtype=np.float32)[:, None] - np.float32(ay)
    n = max(ux * ux + uy * uy - (rb - ra) ** 2, .25)     # seen end on, one sphere covers the other
    sx, sy, shear = 1 + stretch * cx * cx, 1 + stretch * cy * cy, stretch * cx * cy
    B = x * ((sx * ux + shear * uy) / n) + y * ((shear * ux + sy * uy) / n) + ra * (rb - ra) / n
    D = (ra * ra - (sx * sx + shear * shear) * x * x) / n - (sy * sy + shear * shear) / n * y * y
    if shear:
        D -= x * (2 * shear * (sx + sy) / n) * y
    D += B * B
    t = np.sqrt(np.maximum(D, 0))
    t *= rise / (n * thin * thin + rise * rise) ** .5
    t += B
    np.clip(t, 0, 1, out=t)
    B -= t
    D -= B * B
    bulge = np.sqrt(D, out=D)
    bulge *= thin * n ** .5
    z = t * rise
    z += bulge
    z += x * lx + (y * ly + az)
    if clipped:                                          # take off what is beyond the plane; the cut may show
        beyond = nx * x + ny * y + nz * (z - az) > limit
        cut = az + (limit - nx * x - ny * y) / nz if nz > .05 else np.float32(np.nan)
        z = np.where(beyond, np.where(cut > z - 2 * bulge, cut, np.nan), z)
    best = depth[y0:y1, x0:x1]
    win = z > best
    np.copyto(best, z, where=win)
    np.copyto(label[y0:y1, x0:x1], index + 1, where=win)


def paint_face(colour: np.ndarray, x: np.ndarray, y: np.ndarray, person: Person, look: dict) -> None:
    """Paint the front of a skull in place, colour (N,3); x, y (N,) from its centre, in skull radii"""
    hair, skin, side = person.palette["hair"], person.palette["skin"], np.abs(x)
    colour[(side - .56) ** 2 + (y + .55) ** 2 < .045] = .8 * skin + (.19, .07, .06)          # cheeks
    if person.style["beard"]:
        colour[(y < -.5) | (side > .7) & (y < -.1)] = hair
    wide, curve = .32 + .06 * look["smile"], -.74 + 1.5 * look["smile"] * (x * x - .04)
    gap = (.02 + .24 * look["mouth"]) * np.sqrt(np.maximum(1 - (x / wide) ** 2, 0))
    lips, inside = (np.abs(y - curve) < gap + .045) & (side < wide), (np.abs(y - curve) < gap) & (side < wide)
    colour[lips] = .35 * skin + (.31, .08, .09)
    colour[inside] = (.36, .07, .1)
    colour[inside & (y > curve + .45 * gap) & (gap > .06)] = (.98, .97, .94)                 # teeth
    brow = .24 + .13 * look["brow"] - .6 * (side - .4) ** 2
    colour[(np.abs(y - brow) < .055) & (np.abs(side - .4) < .2)] = .75 * hair
    shut = look["blink"] > .5
    lid = (y + .12) / (.22 * (1 - .88 * look["blink"]))
    colour[((side - .4) / .17) ** 2 + lid ** 2 < 1] = .35 * skin if shut else (.97, .96, .94)
    if not shut:
        pupil = (x - .4 * np.sign(x) - .05 * look["gaze"]) / .125
        colour[pupil ** 2 + .9 * lid ** 2 < .8] = (.13, .09, .1)
        colour[(pupil + .35) ** 2 + (lid - .4) ** 2 < .09] = 1
    if person.style["glasses"]:
        rim = np.abs(np.hypot(side - .4, y + .12) - .31) < .04
        colour[rim | (side < .1) & (np.abs(y + .08) < .04)] = .6 * person.palette["accent"]


# Radius of each of BONES for how often a pattern fits around; equal along a limb, lest stripes break there.
GIRTH = np.array([.078, .078, 0, *[.036, .036, .036, .054, .054, .054] * 2])


def paint(person: Person, part: np.ndarray, xyz: list, look: dict) -> tuple[np.ndarray, np.ndarray]:
    """Cones (N,) and positions x, y, z (N,) in their bones' coordinates -> RGB (N,3), is it face (N,)"""
    material, bone, (x, y, z) = person.material[part], person.bone[part, 0], xyz
    style, palette, (skull_y, R) = person.style, person.palette, person.skull
    skin, _, top, bottom, shoes, _ = range(len(MATERIALS))
    if style["outfit"] == "overalls":
        bib = (z > 0) & (np.abs(x) < .056) & (y < .115) | (np.abs(np.abs(x) - .044) < .013)
        material = np.where((material == top) & (bone == BONE["chest"]) & bib, bottom, material)
    colour = np.array([palette[name] for name in MATERIALS], np.float32)[material]
    times = (np.round(2 * np.pi * GIRTH / style["period"]) / (2 * np.pi)).astype(np.float32)
    for index, name in ((top, "top"), (bottom, "bottom")):
        at = np.flatnonzero(material == index)
        along = (y[at] + np.float32(.08) * (bone[at] == BONE["chest"])) / np.float32(style["period"])
        share = PATTERNS[style[name]](np.arctan2(x[at], z[at]) * times[bone[at]], along)
        colour[at] += share[:, None] * (palette[name + "2"] - palette[name]).astype(np.float32)
    colour[(material == shoes) & ((bone == FEET[0]) | (bone == FEET[1])) & (y < -.036)] = .94     # soles
    face = (bone == BONE["head"]) & (material == skin) & (z > .25 * R) & (np.abs(x) < .87 * R)
    at = np.flatnonzero(face)
    front = colour[at]
    paint_face(front, x[at] / R, (y[at] - skull_y) / R, person, look)
    colour[at] = front
    return colour, face


def light(depth: np.ndarray, hit: np.ndarray, unit: float, middle: float) -> np.ndarray:
    """Two soft tones from the surface's slope, darker far limbs, contours where depth drops -> (N,)"""
    slope_x = cv2.Sobel(depth, cv2.CV_32F, 1, 0, scale=1 / 8).ravel()[hit]
    slope_y = cv2.Sobel(depth, cv2.CV_32F, 0, 1, scale=1 / 8).ravel()[hit]
    facing = (.74 + .45 * slope_x + .5 * slope_y) / np.sqrt(1 + slope_x * slope_x + slope_y * slope_y)
    z = depth.ravel()[hit]
    tone = (.78 + .22 * np.clip((facing - .28) / .14, 0, 1)) * np.clip(1 + .9 * (z - middle) / unit, .86, 1)
    thick = max(3, round(.009 * unit) | 1)
    behind = cv2.erode(depth, np.ones((thick, thick), np.uint8)).ravel()[hit]
    tone[z - behind > .022 * unit] = .7
    return tone


def draw_person(person: Person, cones: np.ndarray, frames: np.ndarray, at: np.ndarray, unit: float,
                look: dict, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """-> corner x, y; from there on RGB times cover, cover, face cover (h,w,5); depth (SUPER h, SUPER w)"""
    ends, radii = cones[:, [0, 1, 3, 4]].reshape(-1, 2, 2), cones[:, 5:7, None]
    corner = np.clip((ends - radii).min((0, 1)) // SUPER - 1, 0, None).astype(int)
    width, height = np.minimum((ends + radii).max((0, 1)) // SUPER + 3, size[::-1]).astype(int) - corner
    depth = np.full((height * SUPER, width * SUPER), -1e4, np.float32)
    label = np.zeros(depth.shape, np.uint8)
    clipped = person.clip[:, :3].any(1)
    origin = np.array([*corner, 0]) * SUPER
    cones = cones - np.pad([*origin, *origin[:2]], (0, cones.shape[1] - 5))
    for index, numbers in enumerate(cones.tolist()):         # floats: scalar arithmetic is faster off numpy
        cast_cone(depth, label, index, numbers, clipped[index])

    hit = np.flatnonzero(label)
    part = label.ravel()[hit].astype(np.intp) - 1
    y, x = (i.astype(np.float32) for i in np.divmod(hit, depth.shape[1]))
    inverse = frames / unit ** 2                         # of a frame whose columns are a unit long
    table = np.concatenate([inverse.reshape(-1, 9), -np.einsum("bi,bij->bj", at - origin, inverse)], 1)
    m = table.T[:, person.bone[:, 0]].astype(np.float32)[:, part]
    xyz = [x * m[k] + y * m[3 + k] + depth.ravel()[hit] * m[6 + k] + m[9 + k] for k in range(3)]
    colour, face = paint(person, part, xyz, look)
    colour *= light(depth, hit, unit, float(at[0, 2]))[:, None]
    face &= frames[BONE["head"], 2, 2] > -.3 * unit      # a jaw from behind is no face
    drawn = np.zeros((depth.size, 5), np.float32)
    drawn[hit] = np.column_stack([colour, np.ones_like(x), face])
    drawn = cv2.resize(drawn.reshape(*depth.shape, 5), (width, height), interpolation=cv2.INTER_AREA)
    return corner, drawn, depth


# ---- A clip ------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Clip:
    video: np.ndarray          # (T,H,W,3) uint8 RGB
    body: np.ndarray           # (T,H,W) bool, exact silhouette: pixels at least half covered
    face: np.ndarray           # (T,H,W) bool, visible face; empty seen from behind
    body_boxes: np.ndarray     # (T,4) float32 x0, y0, x1, y1; the ends are exclusive
    face_boxes: np.ndarray     # (T,4) float32, NaN where no face is visible
    joints: np.ndarray         # (T,J,2) float32 x, y in the order of JOINTS, also outside the frame
    visible: np.ndarray        # (T,J) bool, inside the frame and not behind the body
    color_key: dict            # "skin", "hair", "top", "top2", ... -> (3,) uint8 RGB before shading


def mask_boxes(masks: np.ndarray) -> np.ndarray:
    """(T,H,W) bool -> (T,4) float32 x0, y0, x1, y1, ends exclusive; NaN for an empty mask"""
    boxes = np.full((len(masks), 4), np.nan, np.float32)
    for box, mask in zip(boxes, masks):
        x, y = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
        if len(x):
            box[:] = x[0], y[0], x[-1] + 1, y[-1] + 1
    return boxes


def view_world(person: Person, view: dict, frames: np.ndarray, at: np.ndarray, size: tuple) -> tuple:
    """World to image at SUPER x size -> frames, origins, unit (T,), and shadow spots (T,3,4) at 1 x size"""
    zoom, centre = view["zoom"], np.array([size[1] - 1, size[0] - 1]) / 2
    feet = centre + (view["feet"] - centre) * zoom[:, None] + view["pan"]
    place = np.pad(feet * SUPER + (SUPER - 1) / 2, ((0, 0), (0, 1)))[:, None]
    unit = view["unit"] * person.tall * zoom * SUPER
    turn = np.diag([1, -1, 1]) @ rotation(0, view["tilt"])
    under, lift = at[:, [0, *FEET]] * (1, 0, 1), at[:, [0, *FEET], 1] * (0, 1, 1)
    spots = (under @ turn.T * unit[:, None, None] + place - (SUPER - 1) / 2) / SUPER
    spots[..., 2] = (.17, .075, .075) * (1 + 2 * lift) * unit[:, None] / SUPER
    spots = np.dstack([spots, (.22, .3, .3) / (1 + 8 * lift)])
    return turn @ frames * unit[:, None, None, None], at @ turn.T * unit[:, None, None] + place, unit, spots


def cast_shadow(image: np.ndarray, spots: np.ndarray) -> None:
    """Darken the ground in place by soft ellipses: x, y, radius, strength (K,4)"""
    shade = np.ones(image.shape[:2], np.float32)
    for x, y, radius, strength in spots:
        across = np.exp(-((np.arange(image.shape[1]) - x) / radius) ** 2)
        shade -= np.outer(strength * np.exp(-((np.arange(image.shape[0]) - y) / (.32 * radius)) ** 2), across)
    image *= shade[..., None]


def render(identity: int, motion: int, expression: int | None = None, camera: int | None = None,
           background: int | None = None, frames: int = 17, size: int | tuple[int, int] = 96,
           start: float = 0, shutter: float = 0) -> Clip:
    """Draw frames start, start + 1, ... at 24 fps; size is a side or (height, width), multiples of 16

    Without a seed of their own, expression and camera follow the motion and the background the identity.
    shutter > 0 exposes the video (not the truth) over that many frames: .5 blurs hands, 3 hides poses.
    """
    size = height, width = (size, size) if isinstance(size, int) else size
    if height % 16 or width % 16 or min(size) < 16:
        near = tuple(max(16, round(side / 16) * 16) for side in size)
        raise ValueError(f"size {height} x {width}: sides must be multiples of 16; the nearest is "
                         f"{near[0]} x {near[1]}")
    expression, camera = (motion if seed is None else seed for seed in (expression, camera))
    background = identity if background is None else background
    if shutter:
        moments = [render(identity, motion, expression, camera, background, frames, size, start + moment)
                   for moment in (0, *shutter * (np.arange(8) - 3.5) / 8)]
        return replace(moments[0], video=np.rint(np.mean([m.video for m in moments[1:]], 0)).astype(np.uint8))

    seconds = (start + np.arange(frames)) / FPS
    person, looks = make_person(identity), expression_track(expression, seconds)
    view, scene = camera_track(camera, seconds, *size), draw_background(background, *size)
    bones, at = pose_skeleton(person, motion_pose(motion, seconds))
    bones, at, unit, spots = view_world(person, view, bones, at, size)
    joints = at[:, JOINT_BONE] + np.einsum("tjik,jk->tji", bones[:, JOINT_BONE], person.joints)
    cones = project_cones(person, bones, at, unit)

    video = np.empty((frames, *size, 3), np.uint8)
    body, face = np.zeros((2, frames, *size), bool)
    visible = np.zeros((frames, len(JOINTS)), bool)
    for t in range(frames):
        zoom, (pan, _) = view["zoom"][t], view["pan"][t]
        down, right = np.array(size) / 2 - .5 - zoom * (np.array(scene.shape[:2]) / 2 - .5)  # of the middle
        image = cv2.warpAffine(scene, np.array([[zoom, 0, right + pan], [0, zoom, down]]), (width, height))
        cast_shadow(image, spots[t])
        look = {name: float(track[t]) for name, track in looks.items()}
        with np.errstate(invalid="ignore"):              # cast_cone means its NaNs
            corner, drawn, depth = draw_person(person, cones[t], bones[t], at[t], float(unit[t]), look, size)
        inside = np.s_[corner[1]:corner[1] + drawn.shape[0], corner[0]:corner[0] + drawn.shape[1]]
        image[inside] = image[inside] * (1 - drawn[..., 3:4]) + drawn[..., :3]
        video[t] = np.clip(image * 255 + .5, 0, 255)
        body[t][inside], face[t][inside] = drawn[..., 3] >= .5, drawn[..., 4] >= .5
        x, y = np.rint(joints[t, :, :2] - corner * SUPER).astype(int).T
        on = np.flatnonzero((x >= 0) & (y >= 0) & (x < depth.shape[1]) & (y < depth.shape[0]))
        visible[t, on] = depth[y[on], x[on]] - joints[t, on, 2] < DEPTH[on] * unit[t]
    joints = ((joints[..., :2] - (SUPER - 1) / 2) / SUPER).astype(np.float32)
    key = {name: np.rint(255 * colour).astype(np.uint8) for name, colour in person.palette.items()}
    return Clip(video, body, face, mask_boxes(body), mask_boxes(face), joints, visible, key)


# ---- Dials for the ablations, and the contact sheet --------------------------------------------------------

def degrade(video: np.ndarray, kind: str, strength: float, seed: int = 0) -> np.ndarray:
    """A.6's failures on (T,H,W,3) uint8 frames, strength in [0,1]; for motion blur see render's `shutter`"""
    if kind == "low_light":
        dark = video / 255 * (1 - .92 * strength)
        noise = strength * (.02 + .12 * np.sqrt(dark)) * np.random.default_rng(seed).normal(size=video.shape)
        return np.rint(255 * np.clip(dark + noise, 0, 1)).astype(np.uint8)
    if kind == "low_resolution":                         # at strength 1 an eighth of each side
        full = video.shape[2], video.shape[1]
        small = [max(1, round(side / 8 ** strength)) for side in full]
        return np.stack([cv2.resize(cv2.resize(f, small, interpolation=cv2.INTER_AREA), full) for f in video])
    raise ValueError(f"cannot degrade by {kind!r}: choose low_light or low_resolution, or render's shutter")


LIMBS = ((1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13),
         (1, 0), (0, 14), (14, 16), (0, 15), (15, 17), (4, 18), (7, 19), (10, 20), (13, 21))


def draw_skeleton(joints: np.ndarray, size: int | tuple[int, int], visible=None) -> np.ndarray:
    """Joints (J,2), or those of them `visible` (J,) -> (H,W,3) uint8 in OpenPose's colours (Table 3, S5)"""
    height, width = (size, size) if isinstance(size, int) else size
    image, thick = np.zeros((height, width, 3), np.uint8), max(1, round(min(height, width) / 40))
    shown = np.isfinite(joints).all(1) & (True if visible is None else visible)
    point = np.rint(np.where(shown[:, None], joints, 0) * 16).astype(int).tolist()
    hue = [[round(255 * c) for c in colorsys.hsv_to_rgb(k % 18 / 18, 1, 1)] for k in range(len(JOINTS))]
    for k, (a, b) in enumerate(LIMBS):
        if shown[a] and shown[b]:
            cv2.line(image, point[a], point[b], [.6 * c for c in hue[k % 18]], thick, cv2.LINE_AA, 4)
    for k in np.flatnonzero(shown):
        cv2.circle(image, point[k], 12 * thick, hue[k], -1, cv2.LINE_AA, 4)
    return image


def contact_sheet(people: list[int], motions: list[int], size: int, frames: int, still: bool) -> np.ndarray:
    """-> (T,H,W,3) uint8 under one camera, seeds as labels; still: every eighth frame side by side, T = 1"""
    rows = []
    for person in people:
        videos = [render(person, motion, camera=7, frames=frames, size=size).video for motion in motions]
        rows.append(np.concatenate([np.concatenate(v[::8], 1)[None] if still else v for v in videos], 2))
    sheet = np.pad(np.concatenate(rows, 1), ((0, 0), (18, 0), (28, 0), (0, 0)), constant_values=255)
    column = (sheet.shape[2] - 28) // len(motions)
    texts = [(f"{p}", 4, 18 + size * row + size // 2) for row, p in enumerate(people)]
    names = [motion_pose(m, np.zeros(1))["name"] for m in motions]
    texts += [(f"{m} {name}", 30 + column * k, 12) for k, (m, name) in enumerate(zip(motions, names))]
    for image in sheet:
        for text, x, y in texts:
            cv2.putText(image, text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, .38, (40, 40, 40), 1, cv2.LINE_AA)
    return sheet


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("-o", "--output", type=Path, default="toy.png", help=".png; .gif and .mp4 move")
    parser.add_argument("--size", type=int, default=96, help="side of each picture, a multiple of 16")
    parser.add_argument("--people", type=int, nargs="+", default=[*range(6)], help="identity seeds: rows")
    parser.add_argument("--motions", type=int, nargs="+", default=[2, 3, 8, 15], help="motion seeds: columns")
    args = parser.parse_args()
    kind = args.output.suffix.lower()
    still = kind == ".png"
    try:
        check_output(args.output, suffixes=(".png", ".gif", ".mp4"))
        sheet = contact_sheet(args.people, args.motions, args.size, 25 if still else 48, still)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    if still:
        write_image(args.output, sheet[0], comment=DRAWN)
    if kind == ".gif":
        write_gif(args.output, sheet, FPS, comment=DRAWN)
    if kind == ".mp4":
        height, width = (side // 2 * 2 for side in sheet.shape[1:3])           # the codec wants even sides
        write_video(args.output, sheet[:, :height, :width], FPS, comment=DRAWN)
    print(f"{args.output}: people {args.people} perform motions {args.motions}")


if __name__ == "__main__":
    main()
