"""Synthetic speech with known mouths: text -> espeak-ng or flite -> 16 kHz audio + viseme tracks.

    python speech.py train SECONDS SEED OUT.npz     mel (u8), visemes (u8), utterance lengths
    python speech.py eval  SEED OUT_DIR             held-out wavs (one per language), their tracks, and held_out.npz

A viseme track has six columns at 25 Hz: jaw, width (-1 rounded .. 1 spread), press (lips shut),
fv (lip under teeth), tongue, upper lip.  Held out for evaluation: the voices in HELD_OUT_VARIANTS, the
flite voice awb, every 13th word of each word list, a tenth of the sentences, and the sentences of
`sentences.py` whose index is 0 modulo 5.
"""
import ctypes
import glob
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import wave

import librosa
import numpy as np
import scipy.signal as sig

from sentences import SENTENCES

RATE = 16000
TRACK_RATE = 100
REST = (0.0, 0.0, 0.12, 0.0, 0.0, 0.0, 1.6)
MEL_LEVELS = 255 / 11          # u8 code of a clamped log-mel value 0..11

# phonemes -> jaw, width, press, fv, tongue, upper lip, dominance (how hard the shape is held against its neighbours)
SHAPES = {}
for symbols, *shape in [
    ("p b m pʰ pʲ bʲ mʲ", 0.03, 0.0, 1.0, 0.0, 0.0, 0.0, 6.0),
    ("f v ʋ ɸ β pf fʲ vʲ", 0.10, 0.1, 0.0, 1.0, 0.0, 0.2, 4.0),
    ("θ ð dh th", 0.22, 0.1, 0.0, 0.0, 1.0, 0.1, 2.0),
    ("t d n ɾ ɗ dx ɳ ʈ ɖ ʔ", 0.17, 0.2, 0.0, 0.0, 0.35, 0.15, 1.0),
    ("l ɫ ʎ ɭ", 0.24, 0.1, 0.0, 0.0, 0.8, 0.05, 1.0),
    ("s z ts dz", 0.07, 0.35, 0.0, 0.0, 0.0, 0.55, 2.2),
    ("ʃ ʒ tʃ dʒ ɕ ʑ sh zh ch jh ʂ ʐ ç tɕ dʑ ʈʂ ɧ", 0.14, -0.5, 0.0, 0.0, 0.0, 0.6, 2.2),
    ("r ɹ ɚ ʁ ʀ er ɝ ɽ", 0.22, -0.4, 0.0, 0.0, 0.1, 0.1, 1.0),
    ("k g ŋ x h ɡ ɣ q hh ng ɦ χ c ɟ ʕ ħ", 0.28, 0.0, 0.0, 0.0, 0.0, 0.0, 0.6),
    ("w ʍ ɥ", 0.08, -1.0, 0.0, 0.0, 0.0, 0.0, 2.6),
    ("j y ɲ ʝ", 0.15, 0.5, 0.0, 0.0, 0.1, 0.1, 1.2),
    ("i iy iː", 0.20, 0.85, 0.0, 0.0, 0.1, 0.3, 1.6),
    ("ɪ ih ɨ ᵻ", 0.28, 0.5, 0.0, 0.0, 0.05, 0.15, 1.2),
    ("e ey eɪ eː", 0.42, 0.6, 0.0, 0.0, 0.05, 0.2, 1.5),
    ("ɛ eh", 0.52, 0.45, 0.0, 0.0, 0.05, 0.15, 1.4),
    ("æ ae a aː aɪ ay aʊ aw ɐ", 0.85, 0.3, 0.0, 0.0, 0.0, 0.15, 1.7),
    ("ɑ aa ɒ ɑː", 0.95, -0.1, 0.0, 0.0, 0.0, 0.05, 1.7),
    ("ʌ ah", 0.60, 0.05, 0.0, 0.0, 0.0, 0.05, 1.3),
    ("ɔ ao ɔɪ oy ɔː", 0.70, -0.6, 0.0, 0.0, 0.0, 0.0, 1.7),
    ("o ow oʊ əʊ oː", 0.48, -0.8, 0.0, 0.0, 0.0, 0.0, 1.8),
    ("u uw ʊ uh uː ɯ ʉ", 0.20, -0.95, 0.0, 0.0, 0.0, 0.0, 1.8),
    ("ə ax ɜ ɘ ɵ axr", 0.34, 0.0, 0.0, 0.0, 0.0, 0.05, 0.8),
    ("ʏ ø œ", 0.28, -0.85, 0.0, 0.0, 0.0, 0.0, 1.6),
]:
    for symbol in symbols.split():
        SHAPES[symbol] = tuple(shape)
DIPHTHONGS = {"aɪ": "aɪ", "eɪ": "eɪ", "ɔɪ": "ɔɪ", "aʊ": "aʊ", "oʊ": "oʊ", "əʊ": "əʊ",
              "ay": "aɪ", "ey": "eɪ", "oy": "ɔɪ", "aw": "aʊ", "ow": "oʊ", "ai": "ai", "ei": "ei", "au": "au", "ou": "ou"}
STRESS = re.compile(r"[ˈˌː]")
DIACRITICS = re.compile(r"[ˈˌːˑ̩̃ʰʲ'\"0-9 _̪͡‿^~.\-˥˦˧˨˩ˤ|;!ˀ̆̈̊]")

TRAIN_VARIANTS = [""] + ["+" + v for v in (
    "f1 f2 f3 f4 m1 m2 m3 m4 m5 m6 m7 klatt klatt2 klatt3 klatt4 whisper croak Andy Annie Alicia Denis Gene Henrique "
    "Hugo Mario Michael pablo steph2 anika grandma grandpa sandro shelby travis victor norbert Lee ed Diogo").split()]
HELD_OUT_VARIANTS = ["+f5", "+m8", "+linda", "+zac", "+quincy", "+belinda", "+max"]
# espeak voice, language of the text, weight in training
VOICES = [("en-us", "en", 5), ("en-gb-x-rp", "en", 4), ("en-gb-scotland", "en", 1), ("es", "es", 1.5),
          ("fr", "fr", 1.2), ("de", "de", 1.5), ("it", "it", 1.2), ("pt-br", "pt", 1), ("nl", "nl", .8), ("pl", "pl", .8),
          ("ru", "ru", .8), ("cmn", "zh", .9), ("ja", "ja", .6), ("hi", "hi", .7), ("ar", "ar", .7)]
WORD_LISTS = {"en": "american-english", "es": "spanish", "fr": "french", "de": "ngerman", "it": "italian",
              "pt": "portuguese", "nl": "dutch", "pl": "polish"}
COMMON = ("the be to of and a in that have I it for not on with he as you do at this but his by from they we say her she or an "
          "will my one all would there their what so up out if about who get which go me when make can like time no just him "
          "know take people into year your good some could them see other than then now look only come its over think also back "
          "after use two how our work first well way even new want because any these give day most us hello welcome please today "
          "maybe something movie problem mouth happy morning family before between move above everybody baby beautiful remember "
          "member number simple example possible").split()


def shape_of(phoneme):
    """The mouth shape of a phoneme, by exact name, then without diacritics, then by its longest known prefix."""
    if phoneme in SHAPES:
        return SHAPES[phoneme]
    bare = DIACRITICS.sub("", phoneme)
    for n in range(len(bare), 0, -1):
        if bare[:n] in SHAPES:
            return SHAPES[bare[:n]]
    return None


UNKNOWN = {}


def viseme_track(segments, seconds, audio):
    """Dominance-blended mouth shapes at 100 Hz for segments (start, end, phoneme); jaw follows loudness a little."""
    n = int(seconds * TRACK_RATE) + 1
    t = np.arange(n) / TRACK_RATE
    total, weight = np.zeros((n, 6)), np.full((n, 1), 1e-6)
    items = []
    for a, b, phoneme in segments:
        if phoneme.startswith("("):        # a language switch, not a sound
            continue
        plain = STRESS.sub("", phoneme)
        if plain in DIPHTHONGS:
            first, second = DIPHTHONGS[plain]
            middle = a + (b - a) * 0.55
            items += [(a, middle, SHAPES[first]), (middle, b, SHAPES[second])]
        elif plain in ("", "_", "pau", "_:"):
            items.append((a, b, REST))
        else:
            shape = shape_of(phoneme)
            if shape is None:
                UNKNOWN[phoneme] = UNKNOWN.get(phoneme, 0) + 1
                shape = SHAPES["ə"]
            items.append((a, b, shape))
    for a, b, shape in items:
        inset = min(0.25 * (b - a), 0.03)
        low, high = a + inset, b - inset
        i, j = max(0, int((low - 0.25) * TRACK_RATE)), min(n, int((high + 0.25) * TRACK_RATE) + 1)
        far = np.maximum(np.maximum(low - t[i:j], t[i:j] - high), 0)
        width = 0.05 if shape is REST else 0.035
        w = (shape[6] * np.exp(-0.7 * (far / width) ** 2))[:, None]
        total[i:j] += w * np.array(shape[:6])
        weight[i:j] += w
    y = total / weight
    smooth = np.hanning(7)
    smooth /= smooth.sum()
    y = np.stack([np.convolve(np.pad(y[:, k], (3, 3), "edge"), smooth, "valid") for k in range(6)], 1)
    hop = RATE // TRACK_RATE
    power = np.zeros(n * hop)
    power[:min(len(audio), n * hop)] = audio[:n * hop] ** 2
    loud = np.sqrt(np.convolve(power, np.ones(hop * 6) / (hop * 6), "same")[::hop][:n] + 1e-9)
    gain = np.clip(0.72 + 0.38 * loud / (np.percentile(loud, 85) + 1e-6), 0.7, 1.2)
    y[:, 0] *= np.convolve(np.pad(gain, (4, 4), "edge"), np.ones(9) / 9, "valid")
    return y.astype(np.float32)


class Espeak:
    """libespeak-ng in this process: audio and phoneme events."""

    class Event(ctypes.Structure):
        class Id(ctypes.Union):
            _fields_ = [("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8)]
        _fields_ = [("type", ctypes.c_int), ("uid", ctypes.c_uint), ("text_position", ctypes.c_int), ("length", ctypes.c_int),
                    ("audio_ms", ctypes.c_int), ("sample", ctypes.c_int), ("user", ctypes.c_void_p), ("id", Id)]
    PHONEME = 7

    def __init__(self):
        self.lib = ctypes.CDLL("libespeak-ng.so.1")
        self.rate = self.lib.espeak_Initialize(2, 0, None, 0x3)
        self.chunks, self.events = [], []
        callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(self.Event))
        self.callback = callback(self._receive)
        self.lib.espeak_SetSynthCallback(self.callback)

    def _receive(self, samples, count, events):
        if count > 0:
            self.chunks.append(np.ctypeslib.as_array(samples, shape=(count,)).copy())
        i = 0
        while events[i].type:
            if events[i].type == self.PHONEME:
                name = bytes(events[i].id.string).split(b"\0")[0].decode("utf8", "ignore")
                self.events.append((events[i].audio_ms / 1000, name))
            i += 1
        return 0

    def speak(self, text, voice, speed, pitch, spread):
        self.chunks.clear()
        self.events.clear()
        if self.lib.espeak_SetVoiceByName(voice.encode()) != 0:
            return None
        for parameter, value in ((1, speed), (3, pitch), (4, spread)):
            self.lib.espeak_SetParameter(parameter, value, 0)
        raw = text.encode()
        self.lib.espeak_Synth(raw, len(raw) + 1, 0, 1, 0, 1, None, None)
        self.lib.espeak_Synchronize()
        if not self.chunks:
            return None
        audio = np.concatenate(self.chunks).astype(np.float32) / 32768
        events = self.events + [(len(audio) / self.rate, "")]
        segments = [(events[i][0], max(events[i + 1][0], events[i][0] + .005), events[i][1]) for i in range(len(events) - 1)]
        return to_rate(audio, self.rate), segments


def flite(text, voice, stretch):
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        done = subprocess.run(["flite", "-voice", voice, "-t", text, "-o", file.name, "-psdur", "--setf", f"duration_stretch={stretch:.2f}"],
                              capture_output=True, text=True, errors="ignore")
        try:
            with wave.open(file.name) as w:
                audio, rate = np.frombuffer(w.readframes(w.getnframes()), np.int16).astype(np.float32) / 32768, w.getframerate()
        except (wave.Error, EOFError):
            return None
    segments, start = [], 0.0
    for token in done.stdout.split():
        phoneme, _, end = token.rpartition(":")
        try:
            end = float(end)
        except ValueError:
            continue
        segments.append((start, end, phoneme))
        start = end
    return (to_rate(audio, rate), segments) if segments else None


def to_rate(audio, rate):
    g = np.gcd(int(rate), RATE)
    return sig.resample_poly(audio, RATE // g, int(rate) // g).astype(np.float32)


class Texts:
    """Sentences of English documentation, random words of eight languages, and short written sentences for the others."""

    def __init__(self, held_out, rng):
        self.rng = rng
        self.words = {}
        for language, name in WORD_LISTS.items():
            with open("/usr/share/dict/" + name, encoding="utf8", errors="ignore") as f:
                words = [w.strip() for w in f if w.strip().isalpha() and 2 <= len(w.strip()) <= 11]
            self.words[language] = [w for i, w in enumerate(words) if (i % 13 == 0) == held_out]
        documents = []
        for path in sorted(glob.glob("/usr/share/doc/*/README*")) + sorted(glob.glob("/usr/share/perl/5.36*/pod/*.pod"))[:60]:
            try:
                with open(path, errors="ignore") as f:
                    text = re.sub(r"[^A-Za-z,.!?'\n ]", " ", f.read())
            except OSError:
                continue
            for sentence in re.split(r"(?<=[.!?])\s+|\n\n", text):
                sentence = re.sub(r"\s+", " ", sentence).strip()
                if 25 < len(sentence) < 140 and sentence.count(" ") > 4:
                    documents.append(sentence)
        random.Random(0).shuffle(documents)
        k = len(documents) // 10
        self.documents = documents[:k] if held_out else documents[k:]
        self.sentences = {l: [s for i, s in enumerate(v) if (i % 5 == 0) == held_out] for l, v in SENTENCES.items()}

    def pick(self, language):
        r = self.rng
        if language in self.sentences and (language not in self.words or r.random() < .15):
            s = r.choice(self.sentences[language])
            return s + " " + r.choice(self.sentences[language]) if r.random() < .4 else s
        if language == "en":
            if r.random() < .45 and self.documents:
                return r.choice(self.documents)
            words = [r.choice(COMMON if r.random() < .6 else self.words["en"]) for _ in range(r.randint(4, 13))]
        else:
            words = [r.choice(self.words[language]) for _ in range(r.randint(3, 9))]
        if r.random() < .4:
            words[r.randint(0, len(words) - 2)] += ","
        return " ".join(words) + r.choice(".!?.")


MEL_FILTERS = librosa.filters.mel(sr=RATE, n_fft=512, n_mels=64, fmin=60, fmax=7600, htk=True).astype(np.float32)
WINDOW = sig.get_window("hann", 512, fftbins=True).astype(np.float32)


def log_mel(audio):
    """[n, 64], 50 Hz, frame i centred on sample 320 i + 160."""
    x = np.pad(audio, (256 - 160, 512))
    n = len(audio) // 320
    frames = np.lib.stride_tricks.sliding_window_view(x, 512)[::320][:n] * WINDOW
    power = np.abs(np.fft.rfft(frames, axis=1)) ** 2
    return np.clip(np.log10(power @ MEL_FILTERS.T + 1e-8) + 8, 0, 11).astype(np.float32)


def room(rng):
    n = int(rng.uniform(.08, .5) * RATE)
    h = rng.normal(size=n) * np.exp(-6.9 * np.arange(n) / n)
    h[:int(.002 * RATE)] = 0
    h *= rng.uniform(.1, .6) / np.sqrt((h ** 2).sum())
    h[0] = 1
    return h.astype(np.float32)


class Speaker:
    def __init__(self, seed, held_out):
        self.rng, self.noise, self.held_out = random.Random(seed), np.random.default_rng(seed), held_out
        self.texts, self.espeak = Texts(held_out, self.rng), Espeak()

    def say(self, voice=None, language=None, use_flite=None):
        """(audio, 25 Hz track) cut to whole video frames, or None."""
        r, np_rng = self.rng, self.noise
        if use_flite if use_flite is not None else r.random() < .33:
            said = flite(self.texts.pick("en"), "awb" if self.held_out else r.choice(["rms", "slt", "kal16", "rms", "slt"]), r.uniform(.8, 1.25))
        else:
            if voice is None:
                voice, language, _ = r.choices(VOICES, [v[2] for v in VOICES])[0]
            variant = r.choice(HELD_OUT_VARIANTS if self.held_out else TRAIN_VARIANTS)
            said = self.espeak.speak(self.texts.pick(language), voice + variant, r.randint(115, 230), r.randint(20, 85), r.randint(20, 90))
        if said is None:
            return None
        x, segments = said
        if not self.held_out and r.random() < .7:      # speed, pitch and formants together
            ratio = r.uniform(.86, 1.16)
            n = int(len(x) * ratio)
            x = np.interp(np.arange(n) / ratio, np.arange(len(x)), x).astype(np.float32)
            segments = [(a * ratio, b * ratio, p) for a, b, p in segments]
        x = x / (np.abs(x).max() + 1e-6) * .5
        track = viseme_track(segments, len(x) / RATE, x)
        gap = int(r.choice([.05, .15, .3, .6, 1.2, 2.2]) * TRACK_RATE)
        hop = RATE // TRACK_RATE
        track = np.concatenate([track[:len(x) // hop], np.tile(np.array(REST[:6], np.float32), (gap, 1))])
        x = np.concatenate([x[:len(x) // hop * hop], np.zeros(gap * hop, np.float32)])
        if not self.held_out:
            if r.random() < .4:
                x = sig.fftconvolve(x, room(np_rng))[:len(x)].astype(np.float32)
            if r.random() < .5:
                x = sig.lfilter(sig.firwin2(65, [0, .05, .15, .3, .6, 1], 10 ** (np_rng.uniform(-10, 8, 6) / 20)), 1, x).astype(np.float32)
        n = min(len(x) // 640, len(track) // 4)
        if n < 10:
            return None
        return x[:n * 640], track[:n * 4].reshape(n, 4, 6)[:, 1:3].mean(1)


def build_training(seconds, seed, out):
    speaker, mels, tracks, total = Speaker(seed, False), [], [], 0
    while total < seconds:
        said = speaker.say()
        if said is None:
            continue
        x, track = said
        mels.append(np.round(log_mel(x) * MEL_LEVELS).astype(np.uint8))
        tracks.append(np.clip(np.round(track * 100 + 100), 0, 255).astype(np.uint8))
        total += len(track) / 25
        if len(mels) % 200 == 0:
            print(f"{total:.0f} s of speech", flush=True)
    np.savez_compressed(out, mel=np.concatenate(mels), vis=np.concatenate(tracks), utterances=np.array([len(t) for t in tracks]))
    print(f"{out}: {total / 60:.1f} min, {len(mels)} utterances, unknown phonemes {sorted(UNKNOWN.items(), key=lambda z: -z[1])[:20]}")


def build_evaluation(seed, folder, seconds=12):
    """One wav and one track per language (held-out voices and texts) and one of flite awb, with pauses between utterances."""
    os.makedirs(folder, exist_ok=True)
    speaker, index = Speaker(seed, True), []
    mels, all_tracks = [], []
    jobs = [(v, l, False, f"{l}-{v}") for v, l, _ in VOICES if v != "en-gb-scotland"] + [(None, "en", True, "en-flite-awb")]
    for voice, language, use_flite, name in jobs:
        xs, tracks, total = [], [], 0
        while total < (seconds * 2 if language == "en" else seconds):
            said = speaker.say(voice, language, use_flite)
            if said is None:
                continue
            xs.append(said[0])
            tracks.append(said[1])
            total += len(said[1]) / 25
        x, track = np.concatenate(xs), np.concatenate(tracks).astype(np.float32)
        with wave.open(os.path.join(folder, name + ".wav"), "wb") as w:
            w.setnchannels(1)
            w.setsampwidth(2)
            w.setframerate(RATE)
            w.writeframes((np.clip(x, -1, 1) * 32767).astype(np.int16).tobytes())
        np.savez_compressed(os.path.join(folder, name + ".npz"), visemes=track)
        mels.append(np.round(log_mel(x) * MEL_LEVELS).astype(np.uint8))
        all_tracks.append(np.clip(np.round(track * 100 + 100), 0, 255).astype(np.uint8))
        index.append({"name": name, "language": language, "voice": voice or "flite awb", "frames": len(track)})
        print(name, len(track) / 25, "s", flush=True)
    np.savez_compressed(os.path.join(folder, "held_out.npz"), mel=np.concatenate(mels), vis=np.concatenate(all_tracks))
    with open(os.path.join(folder, "index.json"), "w") as f:
        json.dump(index, f, indent=1)
    print("unknown phonemes", sorted(UNKNOWN.items(), key=lambda z: -z[1])[:20])


if __name__ == "__main__":
    if sys.argv[1] == "train":
        build_training(float(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
    else:
        build_evaluation(int(sys.argv[2]), sys.argv[3])
