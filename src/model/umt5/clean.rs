//! What happens to a prompt before it becomes tokens (MODEL.md §4.1; wan/modules/tokenizers.py of Wan-Video/Wan2.2 at
//! 42bf4cf, which calls `ftfy.fix_text`, `html.unescape` twice and collapses whitespace).
//!
//! The repair of mis-decoded text follows ftfy's defaults where prompts are concerned: UTF-8 that was read as
//! Windows-1252, curled quotes, ligatures, full-width letters and punctuation (so the commas of a Chinese prompt become
//! ASCII commas), control characters, line ends, canonical composition. ftfy's statistical judgement of rarer encodings
//! (MacRoman, code page 437, …) is not reproduced.

use unicode_normalization::{UnicodeNormalization, is_nfc};

/// Cleans a prompt in the mode that S2V uses ("whitespace").
pub fn clean(text: &str) -> String {
    collapse(&unescape(&unescape(&repair(text))))
}

/// The mode "lower": [`clean`], then lower case.
pub fn lower(text: &str) -> String {
    clean(text).to_lowercase()
}

/// The mode "canonicalize": underscores to spaces, ASCII punctuation removed, lower case, whitespace collapsed.
pub fn canonicalize(text: &str) -> String {
    let plain = unescape(&unescape(&repair(text))).replace('_', " ");
    let bare: String = plain.chars().filter(|c| !c.is_ascii_punctuation()).collect();
    collapse(&bare.to_lowercase())
}

/// Every run of Unicode whitespace becomes one space; none at the ends.
fn collapse(text: &str) -> String {
    // Python's \s also holds the four ASCII separators
    let space = |c: char| c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c);
    text.split(space).filter(|w| !w.is_empty()).collect::<Vec<_>>().join(" ")
}

fn unescape(text: &str) -> String {
    html_escape::decode_html_entities(text).into_owned()
}

/// The byte that Windows-1252 (with Latin-1 in its gaps, as browsers do) writes for a character.
fn byte_1252(c: char) -> Option<u8> {
    const HIGH: [char; 32] = [
        '€', '\u{81}', '‚', 'ƒ', '„', '…', '†', '‡', 'ˆ', '‰', 'Š', '‹', 'Œ', '\u{8d}', 'Ž', '\u{8f}', '\u{90}', '‘',
        '’', '“', '”', '•', '–', '—', '˜', '™', 'š', '›', 'œ', '\u{9d}', 'ž', 'Ÿ',
    ];
    match c as u32 {
        n @ (0..=0x7f | 0xa0..=0xff) => Some(n as u8),
        n @ 0x80..=0x9f => Some(n as u8),
        _ => HIGH.iter().position(|&h| h == c).map(|i| 0x80 + i as u8),
    }
}

/// One mis-decoded character at the front of `chars`: what it was, and how many characters it takes now.
fn misread(chars: &[char]) -> Option<(char, usize)> {
    let first = byte_1252(*chars.first()?)?;
    let n = match first {
        0xc2..=0xdf => 2,
        0xe0..=0xef => 3,
        0xf0..=0xf4 => 4,
        _ => return None,
    };
    let bytes: Vec<u8> = chars.get(..n)?.iter().map(|&c| byte_1252(c)).collect::<Option<_>>()?;
    let c = std::str::from_utf8(&bytes).ok()?.chars().next()?;
    // “É” before a closing quotation mark or a dash is a word, not a mistake: two characters need a telling second one
    let telling = matches!(first, 0xc2 | 0xc3) || !"‘’“”–—…•™‹›«»€".contains(chars[1]);
    (n > 2 || telling).then_some((c, n))
}

fn unmix(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let mut out = String::with_capacity(text.len());
    let mut at = 0;
    while at < chars.len() {
        match misread(&chars[at..]) {
            Some((c, n)) => {
                out.push(c);
                at += n;
            }
            None => {
                out.push(chars[at]);
                at += 1;
            }
        }
    }
    out
}

/// Mends text as `ftfy.fix_text` does for what occurs in prompts.
pub fn repair(text: &str) -> String {
    let mut text = if text.contains('<') { text.to_string() } else { unescape(text) };
    // twice-encoded text takes two rounds
    for _ in 0..4 {
        let next = unmix(&text);
        if next == text {
            break;
        }
        text = next;
    }
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '‘' | '’' | '‚' | '‛' => out.push('\''),
            '“' | '”' | '„' | '‟' => out.push('"'),
            'ﬀ' => out.push_str("ff"),
            'ﬁ' => out.push_str("fi"),
            'ﬂ' => out.push_str("fl"),
            'ﬃ' => out.push_str("ffi"),
            'ﬄ' => out.push_str("ffl"),
            'ﬅ' | 'ﬆ' => out.push_str("st"),
            'Ĳ' => out.push_str("IJ"),
            'ĳ' => out.push_str("ij"),
            '\u{3000}' | '\u{ff01}'..='\u{ffef}' => out.extend(std::iter::once(c).nfkc()),
            '\r' => {
                chars.next_if_eq(&'\n');
                out.push('\n');
            }
            '\u{2028}' | '\u{2029}' | '\u{85}' => out.push('\n'),
            '\u{0}'..='\u{8}' | '\u{b}' | '\u{e}'..='\u{1f}' | '\u{7f}' | '\u{feff}' => {}
            '\u{206a}'..='\u{206f}' | '\u{fff9}'..='\u{fffc}' => {}
            _ => out.push(c),
        }
    }
    if is_nfc(&out) { out } else { out.nfc().collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whitespace_of_every_kind_becomes_one_space() {
        assert_eq!(clean("  a\u{a0}\u{2003}b\t\n c \u{1f} "), "a b c");
        assert_eq!(clean(""), "");
    }

    #[test]
    fn entities_are_unescaped_twice() {
        assert_eq!(clean("a &amp;lt;b&amp;gt; &quot;c&quot; < d"), "a <b> \"c\" < d");
        assert_eq!(clean("caf&eacute; &#233; &#x4e2d;"), "café é 中");
    }

    #[test]
    fn text_read_in_the_wrong_encoding_is_mended() {
        assert_eq!(clean("schÃ¶n"), "schön");
        assert_eq!(clean("itâ€™s fine â€“ really"), "it's fine – really");
        assert_eq!(clean("ðŸ˜€ smile"), "😀 smile");
        assert_eq!(clean("ä½\u{a0}å¥½"), "你好");
        // encoded twice
        assert_eq!(clean("schÃƒÂ¶n"), "schön");
    }

    #[test]
    fn good_text_stays() {
        for text in ["schön", "“CAFÉ”", "À la carte", "中文提示", "Привет, мир", "नमस्ते", "안녕하세요", "x – y"]
        {
            let plain = text.replace(['“', '”'], "\"");
            assert_eq!(clean(text), plain);
        }
    }

    #[test]
    fn widths_ligatures_quotes_and_composition() {
        assert_eq!(clean("色调艳丽，过曝，静态"), "色调艳丽,过曝,静态");
        assert_eq!(clean("Ｆｕｌｌ　ｗｉｄｔｈ"), "Full width");
        assert_eq!(clean("ｶﾞ"), "ガ");
        assert_eq!(clean("ﬁne ‘quoted’"), "fine 'quoted'");
        assert_eq!(clean("e\u{301}"), "é");
        assert_eq!(clean("a\u{0}b\u{7}"), "ab");
    }

    #[test]
    fn the_other_modes() {
        assert_eq!(lower(" A  B "), "a b");
        assert_eq!(canonicalize("Hello_World,  it's!"), "hello world its");
    }
}
