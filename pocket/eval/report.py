"""REPORT.md from report.json: what was measured beside what is asked."""
import os

NAMES = {"en": "English", "de": "German", "fr": "French", "es": "Spanish", "it": "Italian", "pt": "Portuguese", "nl": "Dutch", "pl": "Polish", "ru": "Russian",
         "zh": "Chinese", "ja": "Japanese", "hi": "Hindi", "ar": "Arabic", "cs": "Czech", "fi": "Finnish"}


def table(head, rows):
    line = lambda cells: "| " + " | ".join(str(c) for c in cells) + " |"
    return "\n".join([line(head), line(["---"] * len(head)), *(line(r) for r in rows)])


def asked(report):
    a = report["all"]
    alone = a["autoencoder_alone"]
    rows = [("mouth opening, r over all frames", "≥ .92", a["opening_r"], a["opening_r"] >= .92), ("width, r", "≥ .8", a["width_r"], a["width_r"] >= .8),
            ("bilabial closures caught", "≥ .92", f"{a['closures_share']:.3f} of {a['closures']}", a["closures_share"] >= .92),
            ("lag, frames, worst clip", "≤ 1", a["opening_lag"], abs(a["opening_lag"]) <= 1),
            ("mouth PSNR", "≥ 27 dB", a["mouth_psnr"], a["mouth_psnr"] >= 27), ("picture PSNR", "≥ 28 dB", a["psnr"], a["psnr"] >= 28),
            ("picture below the autoencoder alone", "≤ 2.5 dB", round(alone["psnr"] - a["psnr"], 2), alone["psnr"] - a["psnr"] <= 2.5),
            ("mouth below the autoencoder alone", "≤ 2.5 dB", round(alone["mouth_psnr"] - a["mouth_psnr"], 2), alone["mouth_psnr"] - a["mouth_psnr"] <= 2.5),
            ("SSIM, multi-scale SSIM", "reported", f"{a['ssim']}, {a['ms_ssim']}", None),
            ("blinks a minute", "10–25", round(a["blinks_a_minute"], 1), 10 <= a["blinks_a_minute"] <= 25), ("longest frozen stretch", "≤ 2 s", f"{a['longest_frozen_s']} s", a["longest_frozen_s"] <= 2),
            ("head: most yaw, pitch, roll (control units)", "≤ .6, .55, .07", f"{a['yaw_most']}, {a['pitch_most']}, {a['roll_most']}", a["yaw_most"] <= .6 and a["pitch_most"] <= .55 and a["roll_most"] <= .07),
            ("silence: motion of the mouth against speech", "≤ .15", a.get("silent_motion"), a.get("silent_motion", 1) <= .15)]
    if "noise_10db" in report:
        cost = report["noise_10db"]["cost"]
        rows.append(("noise at 10 dB costs, r", "≤ .05", cost, cost <= .05))
    if "human" in report:
        people = [v["loudness_r"] for k, v in report["human"].items() if k != "synthetic"]
        if people:
            worst = report["human"]["synthetic"] - min(people)
            rows.append(("people: opening against loudness, synthetic less the worst recording", "≤ .1", round(worst, 3), worst <= .1))
    if "drift" in report:
        rows.append((f"drift over {report['drift']['seconds']:.0f} s, worst measure", "≤ 5 %", f"{100 * report['drift']['worst_loss']:.1f} %", report["drift"]["worst_loss"] <= .05))
    return table(("measure", "asked", "measured", ""), [(m, w, v, "" if ok is None else "reached" if ok else "**not reached**") for m, w, v, ok in rows])


def write_report(report, folder):
    row = lambda r: (r["opening_r"], r["width_r"], f"{r['closures_caught']}/{r['closures']}", r["opening_lag"], r["mouth_psnr"], r["psnr"], r["ms_ssim"])
    head = ("opening r", "width r", "closures", "lag", "mouth dB", "picture dB", "MS-SSIM")
    parts = ["# Evaluation of the pocket model", "", f"Engine: {report['engine']}, {report['size']}×{report['size']}. Voices, texts, faces and movement were never used in training. `evaluate.py` writes this file.", "",
             asked(report), "", "## By language", "",
             table(("language", "clips", *head), [(NAMES.get(k, k), r["clips"], *row(r)) for k, r in sorted(report["languages"].items(), key=lambda z: NAMES.get(z[0], z[0]))]),
             "", "## By clip", "", table(("clip", *head, "audio net: jaw, width"), [(k, *row(r), f"{r['audio_net_r']['jaw']:.2f}, {r['audio_net_r']['width']:.2f}") for k, r in report["clips"].items()])]
    a = report["all"]
    parts += ["", "Audio net alone, r: " + ", ".join(f"{k} {v:.3f}" for k, v in a["audio_net_r"].items()) + ". Controls read back, r: " + ", ".join(f"{k} {v:.3f}" for k, v in a["controls_r"].items()) + "."]
    for key, title in (("noise_10db", "Noise at 10 dB"), ("human", "Recordings of people"), ("drift", "Drift")):
        if key in report:
            parts += ["", f"## {title}", "", table(("what", "value"), [(k, v) for k, v in report[key].items()])]
    pictures = sorted(f for f in os.listdir(folder) if f.startswith("cast-"))
    if pictures:
        parts += ["", "## Side by side", "", "Each pair: truth, generated."] + [f"\n{NAMES.get(f[5:7], f[5:7])}\n\n![]({f})" for f in pictures]
    with open(os.path.join(folder, "REPORT.md"), "w", encoding="utf-8") as f:
        f.write("\n".join(parts) + "\n")
