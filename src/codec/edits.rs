//! The edit list of an MP4 file's sound track: which part of the decoded sound is meant to be heard.
//!
//! Encoders put priming samples in front (1024 or 2112 for AAC, the pre-skip for Opus) and say in `elst` where the
//! sound begins. The demuxer used for files does not report it, so the few boxes on the way are walked here.
//! ISO/IEC 14496-12 §8.6.6.

use std::io::{Read, Seek, SeekFrom};

/// The first edit that plays media.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Edit {
    /// Where the sound begins, in units of `media_scale` per second.
    pub(super) media_time: u64,
    pub(super) media_scale: u32,
    /// How much of it is heard, and the units per second of that; `None` = all.
    pub(super) duration: Option<(u64, u32)>,
}

/// Nesting is shallow and boxes in a real header are few; anything beyond is not read.
const MOST_BOXES: usize = 4096;

/// The edit of the first sound track; `None` when the file is not MP4 or has no edit list.
/// Never fails: a file whose boxes make no sense simply has no edit here.
pub(super) fn first_sound_edit<R: Read + Seek>(file: &mut R) -> Option<Edit> {
    let end = file.seek(SeekFrom::End(0)).ok()?;
    let mut budget = MOST_BOXES;
    if &next(file, 0, end, &mut budget)?.0 != b"ftyp" {
        return None;
    }
    let moov = find(file, b"moov", 0, end, &mut budget)?;
    let mvhd = find(file, b"mvhd", moov.0, moov.1, &mut budget)?;
    let movie_scale = scale(file, mvhd)?;
    let mut at = moov.0;
    while let Some((kind, body, after)) = next(file, at, moov.1, &mut budget) {
        at = after;
        if &kind != b"trak" {
            continue;
        }
        let Some(mdia) = find(file, b"mdia", body, after, &mut budget) else { continue };
        let Some(hdlr) = find(file, b"hdlr", mdia.0, mdia.1, &mut budget) else { continue };
        if bytes::<4>(file, hdlr.0 + 8)? != *b"soun" {
            continue;
        }
        let mdhd = find(file, b"mdhd", mdia.0, mdia.1, &mut budget)?;
        let media_scale = scale(file, mdhd)?;
        let edts = find(file, b"edts", body, after, &mut budget)?;
        let elst = find(file, b"elst", edts.0, edts.1, &mut budget)?;
        return edit(file, elst, media_scale, movie_scale);
    }
    None
}

fn edit<R: Read + Seek>(file: &mut R, elst: (u64, u64), media_scale: u32, movie_scale: u32) -> Option<Edit> {
    let long = bytes::<1>(file, elst.0)?[0] == 1;
    let count = u32::from_be_bytes(bytes(file, elst.0 + 4)?);
    let size = if long { 20 } else { 12 };
    for i in 0..u64::from(count.min(16)) {
        let entry = elst.0 + 8 + i * size;
        if entry + size > elst.1 {
            return None;
        }
        let (duration, media_time) = if long {
            (u64::from_be_bytes(bytes(file, entry)?), i64::from_be_bytes(bytes(file, entry + 8)?))
        } else {
            let time = i32::from_be_bytes(bytes(file, entry + 4)?);
            (u64::from(u32::from_be_bytes(bytes(file, entry)?)), i64::from(time))
        };
        // −1 is an empty edit: silence before the sound, which speech has no use for.
        if media_time >= 0 {
            let duration = (duration > 0 && movie_scale > 0).then_some((duration, movie_scale));
            return Some(Edit { media_time: media_time as u64, media_scale, duration });
        }
    }
    None
}

/// The time scale in a `mvhd` or `mdhd` body.
fn scale<R: Read + Seek>(file: &mut R, body: (u64, u64)) -> Option<u32> {
    let at = if bytes::<1>(file, body.0)?[0] == 1 { 20 } else { 12 };
    let scale = u32::from_be_bytes(bytes(file, body.0 + at)?);
    (scale > 0).then_some(scale)
}

/// Body bounds of the first box of a kind between `at` and `end`.
fn find<R: Read + Seek>(file: &mut R, kind: &[u8; 4], mut at: u64, end: u64, budget: &mut usize) -> Option<(u64, u64)> {
    while let Some((k, body, after)) = next(file, at, end, budget) {
        if &k == kind {
            return Some((body, after));
        }
        at = after;
    }
    None
}

/// Kind, start of the body and end of the box at `at`.
fn next<R: Read + Seek>(file: &mut R, at: u64, end: u64, budget: &mut usize) -> Option<([u8; 4], u64, u64)> {
    *budget = budget.checked_sub(1)?;
    if at.checked_add(8)? > end {
        return None;
    }
    let head: [u8; 8] = bytes(file, at)?;
    let kind = [head[4], head[5], head[6], head[7]];
    let (size, body) = match u32::from_be_bytes([head[0], head[1], head[2], head[3]]) {
        0 => (end - at, at + 8),
        1 => (u64::from_be_bytes(bytes(file, at + 8)?), at + 16),
        n => (u64::from(n), at + 8),
    };
    let after = at.checked_add(size)?;
    (size >= body - at && after <= end).then_some((kind, body, after))
}

fn bytes<const N: usize>(file: &mut (impl Read + Seek), at: u64) -> Option<[u8; N]> {
    let mut out = [0; N];
    file.seek(SeekFrom::Start(at)).ok()?;
    file.read_exact(&mut out).ok()?;
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Cursor;

    fn boxed(kind: &[u8; 4], body: &[u8]) -> Vec<u8> {
        [&(body.len() as u32 + 8).to_be_bytes()[..], kind, body].concat()
    }

    #[test]
    fn the_edit_of_the_sound_track_is_found_and_nonsense_is_not() {
        let mut header = vec![0; 12];
        header.extend(1000u32.to_be_bytes());
        header.extend([0; 8]);
        let mut media = vec![0; 12];
        media.extend(44_100u32.to_be_bytes());
        media.extend([0; 8]);
        let list =
            [&[0, 0, 0, 0, 0, 0, 0, 1][..], &1500u32.to_be_bytes(), &1024i32.to_be_bytes(), &[0, 1, 0, 0]].concat();
        let mdia = [boxed(b"mdhd", &media), boxed(b"hdlr", b"\0\0\0\0\0\0\0\0soun\0\0\0\0")].concat();
        let trak = [boxed(b"edts", &boxed(b"elst", &list)), boxed(b"mdia", &mdia)].concat();
        let moov = [boxed(b"mvhd", &header), boxed(b"trak", &trak)].concat();
        let file = [boxed(b"ftyp", b"M4A "), boxed(b"moov", &moov)].concat();
        let want = Edit { media_time: 1024, media_scale: 44_100, duration: Some((1500, 1000)) };
        assert_eq!(first_sound_edit(&mut Cursor::new(&file)), Some(want));
        for cut in 0..file.len() {
            // Any prefix: an answer or none, never a panic.
            let _ = first_sound_edit(&mut Cursor::new(&file[..cut]));
        }
        assert_eq!(first_sound_edit(&mut Cursor::new(b"RIFF....WAVE")), None);
    }
}
