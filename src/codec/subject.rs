//! Whether there is a face-sized subject in a portrait, as far as pixels alone can tell.
//!
//! Nothing here knows what a face is. What can be told: a picture without any contrast shows nobody; and where there is
//! a connected region of the colours that skin has, of whatever shade (Chai and Ngan, "Face segmentation using skin-color
//! map in videophone applications", IEEE Trans. CSVT 9(4), 1999: Cb 77…127, Cr 133…173), its height says how large the
//! person is seen. Black-and-white pictures and painted skin have none, and then nothing is said. So this warns and never
//! refuses: the engine that is to show the picture has the last word when it is opened.

use crate::media::Portrait;

/// Side of the grid that is looked at: the colours of its cells are means.
const GRID: usize = 64;
/// Standard deviation of brightness (of 255) below which a picture is one colour.
const FLAT: f64 = 4.0;
/// Cells a region of skin must have to be one.
const LEAST_CELLS: usize = 6;
/// Below this share of the picture's height a face is too small to be animated well: a head-and-shoulders portrait has
/// one of a third to two thirds.
const SMALL: f64 = 0.18;

/// What the largest region of skin colours is like.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Subject {
    pub flat: bool,
    /// Height of the region as a share of the picture's.
    pub height: Option<f64>,
}

impl Subject {
    /// What whoever brought the picture should know, as a code and a sentence; `None` when nothing speaks against it.
    pub fn warning(&self) -> Option<(&'static str, String)> {
        match self.height {
            _ if self.flat => Some(("nobody", "The picture is one flat colour: nobody can be seen in it.".into())),
            Some(height) if height < SMALL => {
                let text = format!(
                    "What looks like a face takes {:.0} % of the picture's height. Crop the picture around head and \
                     shoulders: a small face moves badly or not at all.",
                    height * 100.0
                );
                Some(("small_face", text))
            }
            _ => None,
        }
    }
}

/// Looks at a portrait.
pub fn subject(portrait: &Portrait) -> Subject {
    let cells = grid(portrait);
    let brightness = |c: &[f64; 3]| 0.299 * c[0] + 0.587 * c[1] + 0.114 * c[2];
    let mean = cells.iter().map(brightness).sum::<f64>() / cells.len() as f64;
    let variance = cells.iter().map(|c| (brightness(c) - mean).powi(2)).sum::<f64>() / cells.len() as f64;
    let flat = variance.sqrt() < FLAT;
    Subject { flat, height: if flat { None } else { tallest(&cells.map(|c| skin(c))) } }
}

fn grid(portrait: &Portrait) -> [[f64; 3]; GRID * GRID] {
    let (width, height) = (portrait.width as usize, portrait.height as usize);
    let span = |i: usize, side: usize| (i * side / GRID, ((i + 1) * side / GRID).max(i * side / GRID + 1).min(side));
    std::array::from_fn(|cell| {
        let ((top, bottom), (left, right)) = (span(cell / GRID, height), span(cell % GRID, width));
        let mut sum = [0.0; 3];
        for y in top..bottom {
            for pixel in portrait.rgb[3 * (y * width + left)..3 * (y * width + right)].chunks_exact(3) {
                sum.iter_mut().zip(pixel).for_each(|(s, p)| *s += f64::from(*p));
            }
        }
        sum.map(|s| s / ((bottom - top) * (right - left)).max(1) as f64)
    })
}

/// ITU-R BT.601, full range.
fn skin([r, g, b]: [f64; 3]) -> bool {
    let cb = 128.0 - 0.168_736 * r - 0.331_264 * g + 0.5 * b;
    let cr = 128.0 + 0.5 * r - 0.418_688 * g - 0.081_312 * b;
    (77.0..=127.0).contains(&cb) && (133.0..=173.0).contains(&cr)
}

/// Height of the largest connected region, as a share.
fn tallest(skin: &[bool; GRID * GRID]) -> Option<f64> {
    let mut seen = [false; GRID * GRID];
    let mut best = (0, 0);
    for start in 0..skin.len() {
        if !skin[start] || seen[start] {
            continue;
        }
        let (mut waiting, mut count, mut rows) = (vec![start], 0, (GRID, 0));
        seen[start] = true;
        while let Some(cell) = waiting.pop() {
            let (x, y) = (cell % GRID, cell / GRID);
            count += 1;
            rows = (rows.0.min(y), rows.1.max(y + 1));
            let beside = [
                (x > 0).then(|| cell - 1),
                (x + 1 < GRID).then(|| cell + 1),
                (y > 0).then(|| cell - GRID),
                (y + 1 < GRID).then(|| cell + GRID),
            ];
            for next in beside.into_iter().flatten().filter(|n| skin[*n]) {
                if !std::mem::replace(&mut seen[next], true) {
                    waiting.push(next);
                }
            }
        }
        if count > best.0 {
            best = (count, rows.1 - rows.0);
        }
    }
    (best.0 >= LEAST_CELLS).then(|| best.1 as f64 / GRID as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flat_picture_shows_nobody_and_a_grey_one_says_nothing() {
        let flat = Portrait { width: 80, height: 60, rgb: vec![200; 3 * 80 * 60].into() };
        assert!(subject(&flat).warning().is_some_and(|w| w.0 == "nobody"));
        let grey = Portrait { rgb: (0..80 * 60).flat_map(|i| [(i % 251) as u8 / 80 * 80; 3]).collect(), ..flat };
        let seen = subject(&grey);
        assert!(!seen.flat && seen.height.is_none() && seen.warning().is_none(), "{seen:?}");
    }
}
