//! The zip archive that `torch.save` writes: a directory of stored (uncompressed) entries, read in place. Archives above
//! 4 GiB (zip64) included. Nothing is unpacked, and every offset is checked against the bytes there are.

use std::{collections::BTreeMap, ops::Range};

/// Little-endian numbers at checked places.
pub(super) fn number(bytes: &[u8], at: usize, width: usize) -> Option<u64> {
    let part = bytes.get(at..at.checked_add(width)?)?;
    Some(part.iter().rev().fold(0, |n, &b| n << 8 | u64::from(b)))
}

fn size(bytes: &[u8], at: usize, width: usize) -> Option<usize> {
    number(bytes, at, width)?.try_into().ok()
}

/// Longest comment behind the directory.
const COMMENT: usize = 65_535;
const END: usize = 22;

/// Byte ranges of the entries by name.
pub(super) fn entries(bytes: &[u8]) -> Result<BTreeMap<String, Range<usize>>, String> {
    let from = bytes.len().saturating_sub(COMMENT + END);
    let tail = &bytes[from..];
    let end = tail
        .windows(4)
        .rposition(|w| w == b"PK\x05\x06")
        .map(|at| from + at)
        .ok_or("the archive has no directory; the file is incomplete")?;
    let broken = || "the archive's directory is damaged".to_string();
    let mut count = size(bytes, end + 10, 2).ok_or_else(broken)?;
    let mut at = size(bytes, end + 16, 4).ok_or_else(broken)?;
    if (count == 0xffff || at == 0xffff_ffff)
        && let Some(locator) = end.checked_sub(20)
        && bytes.get(locator..locator + 4) == Some(b"PK\x06\x07")
    {
        let big = size(bytes, locator + 8, 8).ok_or_else(broken)?;
        if bytes.get(big..big.saturating_add(4)) != Some(b"PK\x06\x06") {
            return Err(broken());
        }
        count = size(bytes, big + 32, 8).ok_or_else(broken)?;
        at = size(bytes, big + 48, 8).ok_or_else(broken)?;
    }
    let mut out = BTreeMap::new();
    for _ in 0..count {
        if bytes.get(at..at.saturating_add(4)) != Some(b"PK\x01\x02") {
            return Err(broken());
        }
        let (name, range, next) = entry(bytes, at).ok_or_else(broken)?;
        let range = range.map_err(|why| format!("{name}: {why}"))?;
        out.insert(name, range);
        at = next;
    }
    Ok(out)
}

type Entry = (String, Result<Range<usize>, String>, usize);

fn entry(bytes: &[u8], at: usize) -> Option<Entry> {
    let method = number(bytes, at + 10, 2)?;
    let packed = number(bytes, at + 20, 4)?;
    let mut wide = [number(bytes, at + 24, 4)?, packed, number(bytes, at + 42, 4)?];
    let (name, extra, comment) = (size(bytes, at + 28, 2)?, size(bytes, at + 30, 2)?, size(bytes, at + 32, 2)?);
    let text = String::from_utf8_lossy(bytes.get(at + 46..at + 46 + name)?).into_owned();
    let mut field = at + 46 + name;
    let fields_end = field + extra;
    while field + 4 <= fields_end {
        let (id, len) = (number(bytes, field, 2)?, size(bytes, field + 2, 2)?);
        if id == 1 {
            let mut place = field + 4;
            for w in wide.iter_mut().filter(|w| **w == 0xffff_ffff) {
                *w = number(bytes, place, 8)?;
                place += 8;
            }
        }
        field += 4 + len;
    }
    let local = usize::try_from(wide[2]).ok()?;
    let start = local.checked_add(30)?.checked_add(size(bytes, local.checked_add(26)?, 2)?)?.checked_add(size(
        bytes,
        local.checked_add(28)?,
        2,
    )?)?;
    let end = start.checked_add(usize::try_from(wide[1]).ok()?)?;
    let range = if method != 0 {
        Err("is compressed, which torch.save never does".to_string())
    } else if end > bytes.len() {
        Err("lies outside the file; it is truncated".to_string())
    } else {
        Ok(start..end)
    };
    Some((text, range, fields_end + comment))
}
