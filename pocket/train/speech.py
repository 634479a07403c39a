"""Synthetic speech with known mouths: text -> a synthesiser that tells its timings -> 16 kHz audio + viseme tracks.

    python speech.py train SECONDS SEED OUT.npz [FAMILY ...]    mel (u8), visemes (u8), utterance lengths; all families, or these
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
import shutil
import subprocess
import sys
import tempfile
import unicodedata

import numpy as np
import scipy.signal as sig

import audio as sound
from audio import MEL_LEVELS, RATE, log_mel, music, read_wave, to_rate, write_wave
from sentences import SENTENCES
from voices import FESTIVAL, KOKORO_LANGUAGES, Ipa, Joe, Kokoro, festival, silences, without

TRACK_RATE = 100
REST = (0.0, 0.0, 0.12, 0.0, 0.0, 0.0, 1.6)

# phonemes -> jaw, width, press, fv, tongue, upper lip, dominance (how hard the shape is held against its neighbours)
SHAPES = {}
for symbols, *shape in [
    ("p b m pʰ pʲ bʲ mʲ", 0.03, 0.0, 1.0, 0.0, 0.0, 0.0, 6.0),
    ("f v ʋ ɸ β pf fʲ vʲ", 0.10, 0.1, 0.0, 1.0, 0.0, 0.2, 4.0),
    ("θ ð dh th", 0.22, 0.1, 0.0, 0.0, 1.0, 0.1, 2.0),
    ("t d n ɾ ɗ dx ɳ ʈ ɖ ʔ", 0.17, 0.2, 0.0, 0.0, 0.35, 0.15, 1.0),
    ("l ɫ ʎ ɭ", 0.24, 0.1, 0.0, 0.0, 0.8, 0.05, 1.0),
    ("s z ts dz", 0.07, 0.35, 0.0, 0.0, 0.0, 0.55, 2.2),
    ("ʃ ʒ tʃ dʒ sh zh ch jh ʂ ʐ ʈʂ ɧ", 0.14, -0.5, 0.0, 0.0, 0.0, 0.6, 2.2),
    ("ɕ ʑ tɕ dʑ ç", 0.14, 0.3, 0.0, 0.0, 0.0, 0.45, 1.8),
    ("r ɹ ɚ ʁ ʀ er ɝ ɽ", 0.22, -0.4, 0.0, 0.0, 0.1, 0.1, 1.0),
    ("k g ŋ ɴ x h ɡ ɣ q hh ng ɦ χ c ɟ ʕ ħ", 0.28, 0.0, 0.0, 0.0, 0.0, 0.0, 0.6),
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
              "ay": "aɪ", "ey": "eɪ", "oy": "ɔɪ", "aw": "aʊ", "ow": "oʊ", "ai": "ai", "ei": "ei", "au": "au", "ou": "ou",
              "iɛ": "iɛ", "iou": "io", "uo": "uo", "uei": "ue", "ua": "ua", "uai": "ua", "yæ": "ʏɛ", "yɛ": "ʏɛ", "iɑ": "iɑ", "uə": "uə", "ɑu": "ɑu", "yə": "ʏə", "onɡ": "oŋ", "ja": "ja"}
# names that espeak-ng gives to other sounds than flite and festival do; Russian y is ɨ
ESPEAK = {"y": "ʏ", "yː": "ʏ", "th": "t", "s.": "ʂ", "ts.": "ʈʂ", "ts.h": "ʈʂ", "i.": "ɨ", "i̪": "ɨ", "ʲ": "j"}
STRESS = re.compile(r"[ˈˌː]")
DIACRITICS = re.compile(r"[ˈˌːˑ̩̃ʰʲ'\"0-9 _̪͡‿^~.\-˥˦˧˨˩ˤ|;!ˀ̆̈̊]")

TRAIN_VARIANTS = [""] + ["+" + v for v in (
    "f1 f2 f3 f4 m1 m2 m3 m4 m5 m6 m7 klatt klatt2 klatt3 klatt4 whisper croak Andy Annie Alicia Denis Gene Henrique "
    "Hugo Mario Michael pablo steph2 anika grandma grandpa sandro shelby travis victor norbert Lee ed Diogo").split()]
HELD_OUT_VARIANTS = ["+f5", "+m8", "+linda", "+zac", "+quincy", "+belinda", "+max"]
# espeak voice, language of the text, weight in training
VOICES = [("en-us", "en", 5), ("en-gb-x-rp", "en", 4), ("en-gb-scotland", "en", 1), ("es", "es", 1.5),
          ("fr", "fr", 1.2), ("de", "de", 1.5), ("it", "it", 1.2), ("pt-br", "pt", 1), ("nl", "nl", .8), ("pl", "pl", .8),
          ("ru", "ru", .8), ("cmn-latn-pinyin", "zh", .9), ("ja", "ja", .6), ("hi", "hi", .7), ("ar", "ar", .7)]
DICT, HUNSPELL = "/usr/share/dict/", "/usr/share/hunspell/"
WORD_LISTS = {"en": DICT + "american-english", "es": DICT + "spanish", "fr": DICT + "french", "de": DICT + "ngerman", "it": DICT + "italian",
              "pt": DICT + "portuguese", "nl": DICT + "dutch", "pl": DICT + "polish", "ru": HUNSPELL + "ru_RU.dic", "ar": HUNSPELL + "ar.dic",
              "hi": HUNSPELL + "hi_IN.dic", "zh": "/usr/lib/python3/dist-packages/jieba/dict.txt", "ja": "/usr/share/mecab/dic/ipadic/{Noun,Noun.verbal,Adj,Adverb,Verb}.csv"}
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
    bare = DIACRITICS.sub("", unicodedata.normalize("NFD", phoneme))
    for n in range(len(bare), 0, -1):
        if bare[:n] in SHAPES:
            return SHAPES[bare[:n]]
    return None


UNKNOWN = {}


def renamed(segments, language):
    """Segments of espeak-ng's phonemes as SHAPES names them"""
    return [(a, b, "ɨ" if language == "ru" and p == "y" else ESPEAK.get(p.lstrip("ˈˌ"), p)) for a, b, p in segments]


def paused(segments, audio):
    """espeak-ng now and then gives a pause to the vowel before it: where a mouth that the sound opens is silent for 90 ms, it rests"""
    gaps, out = silences(audio), []
    for a, b, phoneme in segments:
        shape = shape_of(STRESS.sub("", phoneme))
        within = [(max(a, u), min(b, v)) for u, v in gaps if shape and shape[0] > .3 and min(b, v) - max(a, u) >= .09]
        out += without((a, b, phoneme), within) + [(u, v, "_") for u, v in within]
    return sorted(out)


def vowelled(text, rng):
    """Arabic with short vowels, which are not written: after consonants without a vowel, one of the three or none"""
    consonants = "بتثجحخدذرزسشصضطظعغفقكلمنهءأئؤ"
    return "".join(c + rng.choices(("\u064e", "\u0650", "\u064f", "\u0652"), (.4, .2, .2, .2))[0] if c in consonants and n in consonants else c for c, n in zip(text, text[1:] + " "))


def pinyin(text):
    """Chinese as espeak-ng reads it well (it spells characters in English)"""
    from pypinyin import Style, lazy_pinyin
    return " ".join(lazy_pinyin(text, style=Style.TONE3, neutral_tone_with_five=True))


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


def any_throat(rng):
    """A voice variant of espeak-ng's nobody has written: size of the throat, its resonances, breath, buzz, stress.  The ranges are
    those of the variants that come with it, or a little beyond."""
    u = rng.uniform
    size = u(.78, 1.12) if rng.random() < .55 else u(1., 1.5)
    base = u(65, 150) * size ** 1.6
    lines = ["language variant", "name throat", f"pitch {base:.0f} {base * u(1.1, 1.8):.0f}", f"formant 0 {100 * u(.8, 1.3):.0f} {u(80, 125):.0f} {u(80, 160):.0f}"]
    for k in range(1, 9):
        height = u(50, 125) if k < 4 else u(15, 120)
        lines.append(f"formant {k} {100 * size * u(.88, 1.12):.0f} {height:.0f} {u(50, 180):.0f} {rng.gauss(0, 60) if k < 4 and rng.random() < .3 else 0:.0f}")
    if rng.random() < .4:
        lines.append("flutter " + str(rng.randint(0, 12)))
    if rng.random() < .3:
        lines.append("roughness " + str(rng.randint(0, 5)))
    lines += [f"voicing {u(60, 130):.0f}", f"consonants {u(60, 160):.0f} {u(60, 160):.0f}"]
    if rng.random() < .35:
        lines.append("breath " + " ".join(str(rng.randint(0, 9)) for _ in range(8)))
        lines.append("breathw " + " ".join(str(rng.randint(100, 400)) for _ in range(8)))
    if rng.random() < .4:
        at = [u(100, 500), u(600, 1100), u(1200, 2000), u(2200, 3200)]
        lines.append("tone " + " ".join(f"{f:.0f} {u(20, 250):.0f}" for f in at))
    if rng.random() < .1:
        lines.append(f"echo {u(10, 140):.0f} {u(5, 25):.0f}")
    if rng.random() < .5:
        lines.append("stressAmp " + " ".join(str(rng.randint(14, 30)) for _ in range(8)))
    if rng.random() < .3:
        lines.append("stressAdd " + " ".join(str(rng.randint(-25, 40)) for _ in range(8)))
    if rng.random() < .15:
        lines.append("klatt " + str(rng.randint(1, 5)))
    return "\n".join(lines) + "\n"


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
        self.folder = tempfile.TemporaryDirectory(prefix="espeak-")            # its data, and a throat that is written anew each time
        self.throat = os.path.join(self.folder.name, "espeak-ng-data", "voices", "!v", "throat")
        said = subprocess.run(["espeak-ng", "--version"], capture_output=True, text=True, check=True).stdout
        shutil.copytree(said.split("Data at:")[1].strip(), os.path.join(self.folder.name, "espeak-ng-data"))
        self.rate = self.lib.espeak_Initialize(2, 0, self.folder.name.encode(), 0x3)
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

    def speak(self, text, voice, speed, pitch, spread, throat=None):
        """`throat`: what a voice variant's file says; `voice` then ends in +throat"""
        if throat:
            with open(self.throat, "w") as f:
                f.write(throat)
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
            audio, rate = read_wave(file.name)
        except (OSError, EOFError):
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


def word_list(language):
    """The words of a language as its voices read them: Japanese in kana, Chinese words that are not rare"""
    path = WORD_LISTS[language]
    if language == "ja":
        names = re.search(r"\{(.*)\}", path)
        lines = [line for name in names[1].split(",") for line in open(path.replace(names[0], name), encoding="euc-jp", errors="ignore")]
        kana = (line.rstrip().split(",")[-2] for line in lines)
        return sorted({"".join(chr(ord(c) - 0x60) if "ァ" <= c <= "ヶ" else c for c in word) for word in kana if 2 <= len(word) <= 8})
    with open(path, encoding="utf8", errors="ignore") as f:
        if language == "zh":
            parts = (line.split() for line in f)
            return [p[0] for p in parts if len(p) == 3 and int(p[1]) >= 30 and len(p[0]) <= 4 and all("\u4e00" <= c <= "\u9fff" for c in p[0])]
        words = (re.split(r"[/\s]", line.strip())[0] for line in f)
        return [w for w in words if 2 <= len(w) <= 11 and (w.isalpha() or language == "hi" and not re.search(r"[\d.-]", w))]


class Texts:
    """Sentences of English documentation, random words, and short written sentences."""

    def __init__(self, held_out, rng):
        self.rng = rng
        self.words = {}
        for language in WORD_LISTS:
            self.words[language] = [w for i, w in enumerate(word_list(language)) if (i % 13 == 0) == held_out]
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
        text = self.written(language)
        return pinyin(text) if language == "zh" else vowelled(text, self.rng) if language == "ar" else text

    def written(self, language):
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
        return ("" if language == "zh" else " ").join(words) + r.choice(".!?.")


class Speaker:
    """Who speaks, in which room, beside which noise.  Families of voices and how often each is heard: espeak-ng (many throats,
    fifteen languages), flite, festival (recorded people), Kokoro and Joe (neural, nearest to people)."""
    FAMILIES = {"espeak": .40, "flite": .10, "festival": .17, "kokoro": .25, "joe": .08}

    def __init__(self, seed, held_out, families=None):
        self.rng, self.noise, self.held_out = random.Random(seed), np.random.default_rng(seed), held_out
        self.texts, self.espeak = Texts(held_out, self.rng), Espeak()
        ipa = Ipa()
        self.kokoro, self.joe, self.waiting = Kokoro(ipa), Joe(ipa), []
        self.families = {k: v for k, v in self.FAMILIES.items() if not families or k in families}

    def festival(self, voice, language, slowness):
        if not self.waiting:                               # a dozen texts at a time
            if voice is None:
                voice, language, _ = self.rng.choice([v for v in FESTIVAL if v[2] == self.held_out])
            if language == "latin":                        # Czech and Finnish: words of a language of like letters
                language = self.rng.choice(["it", "pl"]) if voice.startswith("czech") else self.rng.choice(["it", "nl"])
            texts = [self.texts.pick(language) for _ in range(12)]
            if language not in ("hi", "ru"):               # these voices read plain letters
                texts = [unicodedata.normalize("NFKD", t).encode("ascii", "ignore").decode() for t in texts]
            self.waiting = [x for x in festival(texts, voice, slowness) if x]
        return self.waiting.pop() if self.waiting else None

    def utterance(self, family, voice, language, slowness):
        r = self.rng
        if family == "flite":
            return flite(self.texts.pick("en"), "awb" if self.held_out else r.choice(["rms", "slt", "kal16", "rms", "slt"]), slowness)
        if family == "festival":
            return self.festival(voice, language, slowness)
        if family == "joe":
            return self.joe.say(self.texts.pick("en"), r, slowness)
        if family == "kokoro":
            if voice is None:
                voice, language, _ = r.choices(KOKORO_LANGUAGES, [v[2] for v in KOKORO_LANGUAGES])[0]
            said = self.kokoro.say(self.texts.pick(language), voice, language, r, self.held_out, 1 / slowness)
            return said and (said[0], renamed(said[1], language))
        if voice is None:
            voice, language, _ = r.choices(VOICES, [v[2] for v in VOICES])[0]
        throat = any_throat(r) if not self.held_out and r.random() < .7 else None
        variant = "+throat" if throat else r.choice(HELD_OUT_VARIANTS if self.held_out else TRAIN_VARIANTS)
        said = self.espeak.speak(self.texts.pick(language), voice + variant, int(r.randint(115, 230) / slowness), r.randint(20, 85), r.randint(20, 90), throat)
        return said and (said[0], paused(renamed(said[1], language), said[0]))

    def say(self, voice=None, language=None, family=None):
        """(audio, 25 Hz track, family) cut to whole video frames, or None."""
        r, np_rng = self.rng, self.noise
        train = not self.held_out
        if train and r.random() < .03:                     # nobody speaks
            n = int(r.uniform(1, 4) * 25) * 640
            x = music(n, np_rng) if r.random() < .6 else np_rng.normal(size=n)
            return (x * 10 ** r.uniform(-2.5, -.8)).astype(np.float32), np.tile(np.array(REST[:6], np.float32), (n // 640, 1)), "nobody"
        family = family or r.choices(list(self.families), list(self.families.values()))[0]
        child, song = train and r.random() < .15, train and r.random() < .04
        ratio = r.uniform(.64, .82) if child else r.uniform(.86, 1.16) if train and r.random() < .7 else 1.
        slowness = (1 / ratio if child else 1.) * r.uniform(.85, 1.2) * (1.7 if song else 1.)
        said = self.utterance(family, voice, language, slowness)
        if said is None:
            return None
        x, segments = said
        if ratio != 1:
            x, segments = sound.resized(x, segments, ratio)
        if song:
            x, segments = sound.sung(x, segments, np_rng)
        x = x / (np.abs(x).max() + 1e-6) * .5
        track = viseme_track(segments, len(x) / RATE, x)
        if train and r.random() < .05:
            x = sound.whispered(x, np_rng)
        gap = int(r.choice([.05, .15, .3, .6, 1.2, 2.2]) * TRACK_RATE)
        hop = RATE // TRACK_RATE
        n = min(len(x) // hop, len(track))
        track = np.concatenate([track[:n], np.tile(np.array(REST[:6], np.float32), (gap, 1))])
        x = np.concatenate([x[:n * hop], np.zeros(gap * hop, np.float32)])
        if train:
            if r.random() < .4:
                x = sig.fftconvolve(x, sound.room(np_rng))[:len(x)].astype(np.float32)
            if r.random() < .5:
                x = sig.lfilter(sig.firwin2(65, [0, .05, .15, .3, .6, 1], 10 ** (np_rng.uniform(-10, 8, 6) / 20)), 1, x).astype(np.float32)
            if r.random() < .10:
                x = x + music(len(x), np_rng) * np.sqrt((x ** 2).mean()) * 10 ** (-r.uniform(3, 20) / 20)
        n = min(len(x) // 640, len(track) // 4)
        if n < 10:
            return None
        return x[:n * 640].astype(np.float32), track[:n * 4].reshape(n, 4, 6)[:, 1:3].mean(1), family


def build_training(seconds, seed, out, families=None):
    speaker, mels, tracks, total, heard = Speaker(seed, False, families), [], [], 0, {}
    while total < seconds:
        said = speaker.say()
        if said is None:
            continue
        x, track, family = said
        heard[family] = heard.get(family, 0) + len(track) / 1500
        mels.append(np.round(log_mel(x) * MEL_LEVELS).astype(np.uint8))
        tracks.append(np.clip(np.round(track * 100 + 100), 0, 255).astype(np.uint8))
        total += len(track) / 25
        if len(mels) % 200 == 0:
            print(f"{total:.0f} s of speech", flush=True)
    np.savez_compressed(out, mel=np.concatenate(mels), vis=np.concatenate(tracks), utterances=np.array([len(t) for t in tracks]))
    print(f"{out}: {total / 60:.1f} min, {len(mels)} utterances, minutes of {({k: round(v, 1) for k, v in heard.items()})}, unknown phonemes {sorted(UNKNOWN.items(), key=lambda z: -z[1])[:20]}")


def build_evaluation(seed, folder, seconds=12):
    """One wav and one track per language (held-out voices and texts) and one of flite awb, with pauses between utterances."""
    os.makedirs(folder, exist_ok=True)
    speaker, index = Speaker(seed, True), []
    mels, all_tracks = [], []
    jobs = [(v, l, "espeak", f"{l}-{v.removesuffix('-latn-pinyin')}") for v, l, _ in VOICES if v != "en-gb-scotland"] + [(None, "en", "flite", "en-flite-awb")]
    jobs += [(v, l, "kokoro", f"{l}-kokoro") for v, l, _ in KOKORO_LANGUAGES if v != "en-gb-x-rp"]
    jobs += [(v, l, "festival", f"{'cs' if 'czech' in v else 'fi' if '_fi_' in v else l}-festival-{v}") for v, l, held_out in FESTIVAL if held_out]
    for voice, language, family, name in jobs:
        speaker.waiting = []
        xs, tracks, total, failed = [], [], 0, 0
        while total < (seconds * 2 if language == "en" else seconds):
            said = speaker.say(voice, language, family)
            if said is None:
                failed += 1
                if failed > 50:
                    raise RuntimeError(f"{name}: this voice says nothing")
                continue
            xs.append(said[0])
            tracks.append(said[1])
            total += len(said[1]) / 25
        x, track = np.concatenate(xs), np.concatenate(tracks).astype(np.float32)
        write_wave(os.path.join(folder, name + ".wav"), x)
        np.savez_compressed(os.path.join(folder, name + ".npz"), visemes=track)
        mels.append(np.round(log_mel(x) * MEL_LEVELS).astype(np.uint8))
        all_tracks.append(np.clip(np.round(track * 100 + 100), 0, 255).astype(np.uint8))
        index.append({"name": name, "language": name[:2], "family": family, "voice": voice or "flite awb", "frames": len(track)})
        print(name, len(track) / 25, "s", flush=True)
    np.savez_compressed(os.path.join(folder, "held_out.npz"), mel=np.concatenate(mels), vis=np.concatenate(all_tracks), utterances=np.array([len(t) for t in all_tracks]))
    with open(os.path.join(folder, "index.json"), "w") as f:
        json.dump(index, f, indent=1)
    print("unknown phonemes", sorted(UNKNOWN.items(), key=lambda z: -z[1])[:20])


if __name__ == "__main__":
    if sys.argv[1] == "train":
        build_training(float(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5:])
    else:
        build_evaluation(int(sys.argv[2]), sys.argv[3])
