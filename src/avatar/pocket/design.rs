//! Designed presenters: a seed and named traits make the renderer's identity numbers, and the renderer of the training
//! data (`pocket/render/presenter.h`) draws them, so that what comes out is of the family the model knows.
//!
//! A look is a short text, `7` or `7,skin=brown,hair=bob`: everything that is not named is drawn at random from the
//! seed, as in training (`identity` in `pocket/train/presenters.py`). The same text is the same face for ever.

use super::portrait::{prepare, resize};
use crate::{avatar::Result, media::Portrait};
use rand_chacha::{
    ChaCha8Rng,
    rand_core::{Rng, SeedableRng},
};
use std::{fmt, str::FromStr};

/// The renderer's identity numbers, and all of its parameters: then ten controls and six visemes.
const IDENTITY: usize = 56;
const PARAMETERS: usize = 72;
/// Smile of the portraits' pose, and lips at rest.
const SMILE: (usize, f32) = (65, 0.3);
const PRESS: (usize, f32) = (68, 0.12);
/// Longest text of a look.
const LONGEST: usize = 400;

/// Traits and what each can be.
pub const TRAITS: [(&str, &[&str]); 11] = [
    ("figure", &["feminine", "masculine"]),
    ("age", &["young", "middle", "old"]),
    ("skin", &["fair", "light", "tan", "olive", "brown", "dark", "deep"]),
    ("hair", &["cropped", "parted", "bob", "long", "bun", "curls", "quiff", "waves", "receding", "ponytail"]),
    ("hair_colour", &["black", "dark_brown", "brown", "chestnut", "blond", "red", "grey", "white"]),
    ("eyes", &["brown", "blue", "green", "hazel", "grey"]),
    ("glasses", &["none", "round", "dark", "tortoiseshell"]),
    ("beard", &["none", "stubble", "full"]),
    ("head", &["none", "headscarf", "turban", "knitted_cap", "hat"]),
    ("clothes", &["round_neck", "jacket", "high_collar", "v_neck", "shirt", "dress"]),
    ("background", &["plain", "lights", "room", "studio"]),
];
const FIGURE: usize = 0;
const AGE: usize = 1;
const SKIN: usize = 2;
const HAIR: usize = 3;
const HAIR_COLOUR: usize = 4;
const EYES: usize = 5;
const GLASSES: usize = 6;
const BEARD: usize = 7;
const HEAD: usize = 8;
const CLOTHES: usize = 9;
const BACKGROUND: usize = 10;

const SKINS: [[f32; 3]; 7] = [
    [0.985, 0.86, 0.77],
    [0.96, 0.79, 0.67],
    [0.91, 0.71, 0.56],
    [0.80, 0.59, 0.44],
    [0.66, 0.46, 0.33],
    [0.50, 0.34, 0.25],
    [0.40, 0.27, 0.20],
];
const HAIRS: [[f32; 3]; 8] = [
    [0.10, 0.08, 0.08],
    [0.20, 0.13, 0.10],
    [0.36, 0.22, 0.13],
    [0.52, 0.32, 0.17],
    [0.82, 0.64, 0.36],
    [0.62, 0.26, 0.14],
    [0.58, 0.57, 0.58],
    [0.84, 0.82, 0.80],
];
const IRISES: [[f32; 3]; 5] =
    [[0.30, 0.18, 0.10], [0.27, 0.44, 0.62], [0.30, 0.48, 0.34], [0.45, 0.32, 0.16], [0.38, 0.41, 0.45]];

/// How a presenter looks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Design {
    pub seed: u64,
    /// What is named of each of [`TRAITS`]: which of its choices.
    traits: [Option<usize>; TRAITS.len()],
}

impl FromStr for Design {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Design, String> {
        if text.len() > LONGEST {
            return Err(format!("a look has at most {LONGEST} characters"));
        }
        let mut parts = text.split(',').map(str::trim);
        let seed = parts.next().unwrap_or_default();
        let seed = seed.parse().map_err(|_| {
            "a look begins with a number and may name traits, such as `7` or `7,skin=brown,hair=bob`".to_string()
        })?;
        let mut design = Design::new(seed);
        for part in parts {
            let (name, choice) = part.split_once('=').ok_or("a trait is written as name=choice, such as skin=brown")?;
            design.set(name, choice)?;
        }
        Ok(design)
    }
}

impl fmt::Display for Design {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.seed)?;
        for ((name, choices), chosen) in TRAITS.iter().zip(self.traits) {
            if let Some(chosen) = chosen {
                write!(f, ",{name}={}", choices[chosen])?;
            }
        }
        Ok(())
    }
}

impl Design {
    /// Everything as this seed has it.
    pub fn new(seed: u64) -> Design {
        Design { seed, traits: [None; TRAITS.len()] }
    }

    /// Names a trait.
    ///
    /// # Errors
    /// There is no such trait or choice; the text says which there are.
    pub fn set(&mut self, name: &str, choice: &str) -> std::result::Result<(), String> {
        let short = |text: &str| text.chars().filter(|c| !c.is_control()).take(30).collect::<String>();
        let names = || TRAITS.map(|t| t.0).join(", ");
        let at = TRAITS.iter().position(|t| t.0 == name);
        let at = at.ok_or_else(|| format!("there is no trait `{}`; there are {}", short(name), names()))?;
        let choices = TRAITS[at].1;
        let chosen = choices.iter().position(|c| *c == choice);
        let no_such = || format!("there is no {name} `{}`; there are {}", short(choice), choices.join(", "));
        self.traits[at] = Some(chosen.ok_or_else(no_such)?);
        Ok(())
    }

    /// The portrait, `size × size`.
    pub fn draw(&self, size: u32) -> Portrait {
        let mut parameters = [0.0; PARAMETERS];
        parameters[..IDENTITY].copy_from_slice(&self.identity());
        parameters[SMILE.0] = SMILE.1;
        parameters[PRESS.0] = PRESS.1;
        let side = size as usize;
        let mut planes = vec![0u8; 3 * side * side];
        // SAFETY: the renderer reads as many numbers as `PARAMETERS` says (`PRESENTER_PARAMETERS` in its header, compared
        // by a test) and writes three planes of `side²` bytes.
        unsafe { loquent_draw_presenter(parameters.as_ptr(), planes.as_mut_ptr(), 1, side as std::ffi::c_int) };
        let rgb: Vec<u8> = (0..3 * side * side).map(|i| planes[i % 3 * side * side + i / 3]).collect();
        Portrait { width: size, height: size, rgb: rgb.into() }
    }

    fn identity(&self) -> [f32; IDENTITY] {
        let mut r = Draw(ChaCha8Rng::seed_from_u64(self.seed));
        let mut p = [0.0f32; IDENTITY];
        // Every number is drawn whether or not it is used, so that naming one trait changes no other.
        let named = |of: usize, drawn: usize| self.traits[of].unwrap_or(drawn);
        let woman = named(FIGURE, r.below(2)) == 0;
        let drawn_age = [0, 0, 1, 2][r.below(4)];
        let age = named(AGE, drawn_age);
        let old = age == 2;
        let (tone, between) = (r.below(6), r.unit());
        let skin = match self.traits[SKIN] {
            Some(named) => SKINS[named],
            None => std::array::from_fn(|i| SKINS[tone][i] * (1.0 - between) + SKINS[tone + 1][i] * between),
        };
        p[0..3].copy_from_slice(&skin);
        let (coloured, greyed) = (r.weighted(&[27, 24, 18, 11, 10, 6]), [6, 7][r.below(2)]);
        let turned = r.unit() < 0.75;
        let hair = HAIRS[named(HAIR_COLOUR, if old && turned { greyed } else { coloured })];
        let shade = r.between(0.88, 1.12);
        p[3..6].copy_from_slice(&hair.map(|v| (v * shade).clamp(0.04, 0.95)));
        let (any, brown) = (r.below(5), r.unit() < tone as f32 / 5.0);
        p[6..9].copy_from_slice(&IRISES[named(EYES, if brown { [0, 3][any % 2] } else { any })]);
        p[9..12].copy_from_slice(&hsv(r.unit(), r.between(0.05, 0.65), r.between(0.2, 0.9)));
        let lips = r.unit();
        let lips = if woman { 0.35 + 0.65 * lips } else { 0.4 * lips };
        for (i, red) in [0.78, 0.27, 0.31].into_iter().enumerate() {
            p[12 + i] = (skin[i] * (0.80 - 0.50 * lips) + red * (0.21 + 0.46 * lips)).clamp(0.0, 1.0);
        }
        let hue = r.unit();
        p[15..18].copy_from_slice(&hsv(hue, r.between(0.04, 0.40), r.between(0.60, 0.97)));
        p[18..21].copy_from_slice(&hsv(hue + r.between(-0.1, 0.1), r.between(0.08, 0.5), r.between(0.3, 0.8)));
        let either = |a: [f32; 2], b: [f32; 2], r: &mut Draw| {
            let [low, high] = if woman { a } else { b };
            r.between(low, high)
        };
        p[21] = r.between(0.33, 0.39);
        p[22] = r.between(0.44, 0.495);
        p[23] = either([0.15, 0.42], [0.02, 0.28], &mut r);
        p[24] = either([1.0, 1.25], [0.90, 1.10], &mut r);
        p[25] = r.between(0.150, 0.170) * p[21] / 0.36;
        p[26] = r.between(-0.07, -0.03);
        p[27] = either([0.010, 0.016], [0.014, 0.023], &mut r);
        p[28] = r.between(0.130, 0.162);
        p[29] = r.between(0.215, 0.245);
        p[30] = r.between(0.85, 1.2);
        let style = r.below(7);
        let style = match (woman, old) {
            (true, _) => [2, 3, 4, 5, 7, 9, 1][style],
            (false, true) => [0, 1, 6, 5, 8, 8, 8][style],
            (false, false) => [0, 1, 1, 6, 6, 5, 0][style],
        };
        p[31] = named(HAIR, style) as f32;
        p[32] = r.between(0.95, 1.1);
        p[33] = named(GLASSES, r.weighted(&[70, 10, 10, 10])) as f32;
        let beard = r.weighted(&[55, 20, 25]);
        p[34] = [0.0, 0.30, 0.9][named(BEARD, if woman { 0 } else { beard })];
        p[35] = named(BACKGROUND, r.below(4)) as f32;
        let clothes = r.below(30);
        p[36] = named(CLOTHES, clothes % if woman { 6 } else { 5 }) as f32;
        p[37] = r.between(0.85, 1.15);
        p[38] = either([0.026, 0.038], [0.019, 0.028], &mut r);
        p[39] = r.unit();
        p[40] = either([0.1, 0.9], [0.0, 0.35], &mut r);
        p[41] = if r.unit() < 0.5 { -1.0 } else { 1.0 };
        let drawn = r.weighted(&[83, 12, 3, 2]);
        // Who names hair wants to see it.
        let covered = if self.traits[HAIR].is_some() { 0 } else { drawn };
        p[42] = named(HEAD, [0, if woman { 1 } else { 2 }, 3, 4][covered]) as f32;
        p[43..46].copy_from_slice(&hsv(r.unit(), r.between(0.05, 0.7), r.between(0.2, 0.9)));
        p[46] = match age {
            0 => r.between(0.0, 0.2),
            1 => r.between(0.3, 0.5),
            _ => r.between(0.6, 1.0),
        };
        let jewel = r.below(3);
        p[47] = if woman && p[42] != 1.0 { jewel as f32 } else { 0.0 };
        let plain = r.unit() < 0.75;
        let (hue, white) = (r.unit(), [r.between(0.0, 0.2), r.between(0.82, 0.98)]);
        p[48..51].copy_from_slice(&if plain { hsv(hue, white[0], white[1]) } else { hsv(hue, 0.5, 0.5) });
        p[51] = either([0.4, 1.0], [0.0, 0.3], &mut r);
        p[52] = either([0.0, 0.0], [0.0, 0.7], &mut r);
        p
    }
}

/// The designed look that a picture resembles most in its colours and where they are; for pictures that the model cannot
/// draw. Takes a few tenths of a second.
///
/// # Errors
/// A picture without pixels, or too small.
pub fn nearest(portrait: &Portrait) -> Result<Design> {
    const SIDE: u32 = 24;
    let wanted = resize(&prepare(portrait, 96)?, 96, SIDE as usize);
    let distance = |design: &Design| {
        let drawn = design.draw(SIDE);
        let mut sum = 0.0;
        for (i, (a, b)) in drawn.rgb.iter().zip(&wanted).enumerate() {
            // The head counts more than what is around it.
            let (x, y) = ((i / 3) as u32 % SIDE, (i / 3) as u32 / SIDE);
            let head = (6..18).contains(&x) && (3..19).contains(&y);
            sum += f64::from(a.abs_diff(*b)).powi(2) * if head { 3.0 } else { 1.0 };
        }
        sum
    };
    let scored = |design: Design| (distance(&design), design);
    let least = |a: (f64, Design), b: (f64, Design)| if b.0 < a.0 { b } else { a };
    let mut best = (1..=96).map(|seed| scored(Design::new(seed))).fold((f64::INFINITY, Design::new(1)), least);
    for (at, (_, choices)) in TRAITS.iter().enumerate() {
        for chosen in 0..choices.len() {
            let mut design = best.1.clone();
            design.traits[at] = Some(chosen);
            best = least(best, scored(design));
        }
    }
    Ok(best.1)
}

unsafe extern "C" {
    /// `render` of `pocket/render/render.c`, under a name of its own: parameters `[n][72]` → `[n][3][size][size]`.
    fn loquent_draw_presenter(parameters: *const f32, out: *mut u8, n: std::ffi::c_int, size: std::ffi::c_int);
}

/// Numbers of one face.
struct Draw(ChaCha8Rng);

impl Draw {
    /// 0..1.
    fn unit(&mut self) -> f32 {
        (self.0.next_u32() >> 8) as f32 / (1 << 24) as f32
    }
    fn between(&mut self, low: f32, high: f32) -> f32 {
        low + (high - low) * self.unit()
    }
    fn below(&mut self, n: usize) -> usize {
        (self.unit() * n as f32) as usize % n
    }
    /// One of several, by their weights.
    fn weighted(&mut self, weights: &[u32]) -> usize {
        let mut left = self.unit() * weights.iter().sum::<u32>() as f32;
        weights
            .iter()
            .position(|w| {
                left -= *w as f32;
                left < 0.0
            })
            .unwrap_or(0)
    }
}

/// Hue (of one turn), saturation and value to red, green and blue.
fn hsv(h: f32, s: f32, v: f32) -> [f32; 3] {
    [0.0, 2.0 / 3.0, 1.0 / 3.0].map(|shift| {
        let k = ((h + shift).rem_euclid(1.0) * 6.0 - 3.0).abs() - 1.0;
        v * (1.0 - s + s * k.clamp(0.0, 1.0))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_renderer_takes_as_many_numbers_as_it_is_given() {
        let header = include_str!("../../../pocket/render/presenter.h");
        assert!(header.contains(&format!("#define PRESENTER_PARAMETERS {PARAMETERS}")));
        assert_eq!(hsv(0.0, 1.0, 1.0), [1.0, 0.0, 0.0]);
        assert_eq!(hsv(1.0 / 3.0, 1.0, 0.5).map(|v| (v * 1e4).round() / 1e4), [0.0, 0.5, 0.0]);
    }

    #[test]
    fn a_look_is_its_text_and_what_is_wrong_with_one_is_said() {
        for text in ["7", "7,skin=brown,hair=bob", "18446744073709551615,figure=masculine,glasses=dark"] {
            assert_eq!(text.parse::<Design>().unwrap().to_string(), text);
        }
        assert_eq!(" 7 , hair=bob , skin=dark".trim().parse::<Design>().unwrap().to_string(), "7,skin=dark,hair=bob");
        for (text, part) in [
            ("", "begins with a number"),
            ("-1", "begins with a number"),
            ("7,skin", "name=choice"),
            ("7,skin=blue", "fair, light"),
            ("7,tail=long", "no trait `tail`"),
            (&"7,skin=dark".repeat(60), "at most"),
        ] {
            let error = text.parse::<Design>().unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn a_trait_changes_what_it_names_and_nothing_else() {
        let parse = |text: &str| text.parse::<Design>().unwrap();
        let plain = parse("11,figure=feminine,age=young,hair=bob,glasses=none,head=none");
        let before = plain.identity();
        for (name, choice, slots) in [
            ("glasses", "dark", 33..34),
            ("hair", "waves", 31..32),
            ("clothes", "shirt", 36..37),
            ("background", "room", 35..36),
            ("eyes", "green", 6..9),
            ("hair_colour", "red", 3..6),
        ] {
            let mut other = plain.clone();
            other.set(name, choice).unwrap();
            let after = other.identity();
            for i in 0..IDENTITY {
                assert!(slots.contains(&i) || before[i] == after[i], "{name} changed number {i}");
            }
            assert_ne!(plain.draw(32).rgb, other.draw(32).rgb, "{name}");
        }
        assert_eq!(plain.draw(64).rgb, parse(&plain.to_string()).draw(64).rgb);
        assert_ne!(Design::new(1).draw(64).rgb, Design::new(2).draw(64).rgb);
    }

    #[test]
    fn the_nearest_look_is_near() {
        let target: Design = "901,figure=masculine,skin=dark,hair=cropped,background=plain".parse().unwrap();
        let picture = target.draw(256);
        let found = nearest(&picture).unwrap();
        let apart = |a: &Portrait, b: &Portrait| -> f64 {
            let sum: u64 = a.rgb.iter().zip(b.rgb.iter()).map(|(a, b)| u64::from(a.abs_diff(*b)).pow(2)).sum();
            sum as f64
        };
        let own = apart(&found.draw(256), &picture);
        let nearer = (1..=60).filter(|seed| apart(&Design::new(*seed).draw(256), &picture) < own).count();
        assert!(nearer <= 2, "{nearer} of 60 looks drawn at random are nearer than {found}");
        let tiny = Portrait { width: 8, height: 8, rgb: vec![0; 192].into() };
        assert!(nearest(&tiny).is_err());
    }
}
