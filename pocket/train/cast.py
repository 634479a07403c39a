"""The built-in cast.   python cast.py OUT_DIR   writes ID.png (256 x 256, the neutral pose) and presenters.json."""
import json
import os
import sys

import numpy as np
import torch

import presenters as ps
from model import REFERENCE

FIELDS = {"skin": (0, 3), "hair": (3, 6), "iris": (6, 9), "cloth": (9, 12), "lip": (12, 15), "back1": (15, 18), "back2": (18, 21), "head_w": 21, "head_h": 22,
          "chin": 23, "eye": 24, "eye_gap": 25, "eye_y": 26, "brow_h": 27, "mouth_w": 28, "mouth_y": 29, "nose": 30, "hair_style": 31, "hair_v": 32,
          "glasses": 33, "beard": 34, "back_style": 35, "clothes": 36, "ears": 37, "lip_h": 38, "seed": 39, "blush": 40, "side": 41, "head_cover": 42,
          "wrap": (43, 46), "age": 46, "jewel": 47, "shirt": (48, 51), "lashes": 51, "square": 52}
CROPPED, SIDE, BOB, LONG, BUN, CURLS, QUIFF, WAVES, SIDES, TAIL = range(10)
WOMAN = {"chin": .30, "eye": 1.14, "brow_h": .0125, "lip_h": .031, "blush": .5, "lashes": .8, "square": 0, "beard": 0, "head_w": .345, "head_h": .465}
MAN = {"chin": .14, "eye": 1.0, "brow_h": .018, "lip_h": .023, "blush": .12, "lashes": .1, "square": .45, "jewel": 0, "head_w": .362, "head_h": .475}
COMMON = {"eye_gap": .158, "eye_y": -.05, "mouth_w": .146, "mouth_y": .229, "nose": 1.0, "hair_v": 1.02, "glasses": 0, "beard": 0, "ears": 1.0, "seed": .6,
          "side": 1, "head_cover": 0, "age": 0, "jewel": 0, "shirt": (.95, .95, .96), "wrap": (.30, .36, .48), "iris": (.30, .19, .11)}
LIGHT, ROSY, TAN, OLIVE, BROWN, DARK = (.97, .82, .71), (.98, .84, .76), (.88, .68, .53), (.80, .60, .45), (.60, .41, .30), (.43, .29, .21)
CAST = [
    ("ada", "Ada", "Young woman, brown skin, high bun, gold earrings, teal round-neck top",
     {**WOMAN, "skin": BROWN, "hair": (.12, .09, .08), "hair_style": BUN, "cloth": (.13, .47, .50), "lip_amount": .75, "back1": (.93, .86, .78), "back2": (.72, .58, .48), "back_style": 3, "clothes": 0, "jewel": 1}),
    ("bruno", "Bruno", "Man in his thirties, light skin, brown quiff and full beard, open blue shirt",
     {**MAN, "skin": LIGHT, "hair": (.36, .22, .13), "hair_style": QUIFF, "beard": .9, "cloth": (.36, .52, .70), "lip_amount": .15, "iris": (.27, .44, .62), "back1": (.80, .84, .82), "back2": (.46, .54, .54), "back_style": 1, "clothes": 4}),
    ("chen", "Chen", "Woman, light skin, black bob, fine round glasses, navy jacket",
     {**WOMAN, "skin": (.95, .80, .66), "hair": (.10, .08, .09), "hair_style": BOB, "glasses": 1, "cloth": (.16, .20, .34), "lip_amount": .55, "back1": (.88, .88, .90), "back2": (.58, .62, .70), "back_style": 2, "clothes": 1, "seed": .8, "eye": 1.06}),
    ("dalia", "Dalia", "Woman with a sand-coloured headscarf, olive skin, green eyes",
     {**WOMAN, "skin": TAN, "hair": (.14, .10, .09), "hair_style": LONG, "head_cover": 1, "wrap": (.78, .69, .58), "cloth": (.36, .40, .44), "lip_amount": .65, "iris": (.32, .46, .33), "back1": (.70, .80, .80), "back2": (.38, .52, .55), "back_style": 3, "clothes": 2}),
    ("edgar", "Edgar", "Elderly man, light skin with lines, grey hair at the sides, dark-rimmed glasses, brown jacket and tie",
     {**MAN, "skin": ROSY, "hair": (.74, .73, .72), "hair_style": SIDES, "glasses": 2, "age": .95, "cloth": (.38, .29, .24), "wrap": (.52, .16, .18), "lip_amount": .1, "iris": (.38, .43, .48), "back1": (.82, .76, .66), "back2": (.50, .42, .36), "back_style": 2, "clothes": 1, "seed": .3}),
    ("farah", "Farah", "Woman, dark skin, wide natural curls, mustard dress and necklace",
     {**WOMAN, "skin": DARK, "hair": (.11, .08, .07), "hair_style": CURLS, "cloth": (.82, .60, .20), "lip_amount": .8, "back1": (.80, .74, .86), "back2": (.46, .40, .58), "back_style": 1, "clothes": 5, "jewel": 2}),
    ("gurdeep", "Gurdeep", "Man with an indigo turban and black beard, brown skin, white shirt, grey jacket",
     {**MAN, "skin": OLIVE, "hair": (.10, .08, .08), "hair_style": CROPPED, "beard": .9, "head_cover": 2, "wrap": (.24, .28, .60), "cloth": (.42, .44, .48), "lip_amount": .2, "back1": (.90, .84, .72), "back2": (.64, .54, .40), "back_style": 3, "clothes": 1, "seed": .7}),
    ("hanna", "Hanna", "Elderly woman, light skin with lines, silver bob, tortoiseshell glasses, plum top with a necklace",
     {**WOMAN, "skin": ROSY, "hair": (.80, .79, .79), "hair_style": BOB, "glasses": 3, "age": .85, "cloth": (.46, .22, .38), "lip_amount": .5, "iris": (.30, .44, .58), "back1": (.84, .88, .80), "back2": (.52, .60, .48), "back_style": 1, "clothes": 3, "jewel": 2, "eye": 1.05}),
    ("ilse", "Ilse", "Young woman, fair skin, long fair waves, blue eyes, coral V-neck",
     {**WOMAN, "skin": (.98, .85, .77), "hair": (.80, .62, .36), "hair_style": WAVES, "cloth": (.84, .42, .36), "lip_amount": .6, "iris": (.28, .46, .64), "back1": (.72, .82, .90), "back2": (.42, .54, .68), "back_style": 3, "clothes": 3}),
    ("jamal", "Jamal", "Young man, dark skin, cropped hair, short stubble, olive sweater with a high collar",
     {**MAN, "skin": DARK, "hair": (.09, .07, .07), "hair_style": CROPPED, "beard": .30, "cloth": (.36, .42, .28), "lip_amount": .3, "back1": (.86, .80, .72), "back2": (.56, .44, .38), "back_style": 0, "clothes": 2}),
    ("kenji", "Kenji", "Man in his twenties, light skin, black side parting, white shirt collar, charcoal jacket",
     {**MAN, "skin": (.94, .77, .62), "hair": (.10, .09, .10), "hair_style": SIDE, "cloth": (.24, .25, .28), "wrap": (.20, .34, .52), "lip_amount": .2, "back1": (.78, .86, .84), "back2": (.40, .52, .52), "back_style": 2, "clothes": 1, "seed": .2, "square": .25}),
    ("lucia", "Lucía", "Woman, tan skin, chestnut ponytail, emerald dress",
     {**WOMAN, "skin": TAN, "hair": (.34, .20, .12), "hair_style": TAIL, "cloth": (.10, .46, .34), "lip_amount": .8, "back1": (.95, .84, .76), "back2": (.76, .56, .48), "back_style": 1, "clothes": 5, "jewel": 1, "side": -1}),
]


def identity_of(look):
    look = {**COMMON, **look}
    look["lip"] = ps.lip_colour(np.array(look["skin"]), look.pop("lip_amount"))
    out = np.zeros(ps.IDENTITY, np.float32)
    for name, value in look.items():
        at = FIELDS[name]
        out[slice(*at) if isinstance(at, tuple) else at] = value
    return out


def cast():
    """ids, identities [n, 56]"""
    return [c[0] for c in CAST], torch.from_numpy(np.stack([identity_of(c[3]) for c in CAST]))


if __name__ == "__main__":
    import cv2
    folder = sys.argv[1]
    os.makedirs(folder, exist_ok=True)
    ids, identities = cast()
    pictures = ps.render(ps.neutral(identities), REFERENCE)
    for name, picture in zip(ids, pictures):
        cv2.imwrite(os.path.join(folder, name + ".png"), picture.permute(1, 2, 0).numpy()[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 9])
    entries = [{"id": c[0], "name": c[1], "description": c[2], "identity": [round(float(v), 4) for v in i]} for c, i in zip(CAST, identities)]
    with open(os.path.join(folder, "presenters.json"), "w") as f:
        f.write("[\n" + ",\n".join(json.dumps(e, ensure_ascii=False) for e in entries) + "\n]\n")
