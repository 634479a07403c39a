//! Text cut into sentences, so that the first can be heard while the rest is still made.

/// Longer pieces are cut at a comma or a space: a voice that is asked for a whole page keeps everybody waiting.
const LONGEST: usize = 300;

/// Words that end in a full stop without ending a sentence, lower case.
const ABBREVIATIONS: &[&str] = &[
    "mr", "mrs", "ms", "dr", "prof", "sr", "jr", "st", "vs", "etc", "e.g", "i.e", "cf", "approx", "no", "vol", "fig",
    "al", "inc", "ltd", "co", "dept", "est", "gen", "col", "sgt", "capt", "lt", "rev", "hon", "jan", "feb", "mar",
    "apr", "jun", "jul", "aug", "sep", "sept", "oct", "nov", "dec", "a.m", "p.m", "ca", "z.b", "bzw", "usw", "nr",
    "str", "d.h", "u.a", "m", "mme", "mlle", "sra", "srta", "ud", "uds", "p.ej",
];

/// The sentences of a text, trimmed, none empty, each at most about [`LONGEST`] characters. Nothing but white space is
/// lost, and pieces without a letter or digit.
pub fn sentences(text: &str) -> Vec<String> {
    let chars: Vec<char> = text.chars().collect();
    let (mut out, mut start, mut i) = (Vec::new(), 0, 0);
    while i < chars.len() {
        let end = match chars[i] {
            '。' | '！' | '？' | '；' | '｡' => Some(closed(&chars, i + 1)),
            '!' | '?' | '…' => Some(closed(&chars, i + 1)).filter(|&e| spaced(&chars, e)),
            '.' if !inside(&chars, start, i) => Some(closed(&chars, i + 1)).filter(|&e| spaced(&chars, e)),
            '\n' if i == start || chars.get(i + 1).is_none_or(|c| c.is_whitespace()) || ends_line(&chars, i) => {
                Some(i + 1)
            }
            _ => None,
        };
        match end {
            Some(end) => {
                push(&mut out, &chars[start..end]);
                (start, i) = (end, end);
            }
            None => i += 1,
        }
    }
    push(&mut out, &chars[start.min(chars.len())..]);
    out
}

/// Past further marks, quotes and brackets that belong to what ends before `at`.
fn closed(chars: &[char], mut at: usize) -> usize {
    while chars.get(at).is_some_and(|c| "!?.…。！？\"'”’»)]）」』】".contains(*c)) {
        at += 1;
    }
    at
}

fn spaced(chars: &[char], at: usize) -> bool {
    chars.get(at).is_none_or(|c| c.is_whitespace() || is_cjk(*c))
}

fn is_cjk(c: char) -> bool {
    matches!(u32::from(c), 0x2E80..=0x9FFF | 0xAC00..=0xD7AF | 0xF900..=0xFAFF | 0xFF00..=0xFFEF | 0x20000..=0x3134F)
}

/// A line that ends without a mark (a heading, an item of a list) ends there if the next begins like a new one.
fn ends_line(chars: &[char], at: usize) -> bool {
    chars.get(at + 1).is_some_and(|c| c.is_uppercase() || c.is_ascii_digit() || is_cjk(*c) || "-*•–".contains(*c))
}

/// Whether the full stop at `at` is part of a number, an abbreviation or initials.
fn inside(chars: &[char], start: usize, at: usize) -> bool {
    let next = chars.get(at + 1).copied();
    if next.is_some_and(|c| c.is_alphanumeric()) {
        // 3.14, example.org, e.g.
        return true;
    }
    let word: String = chars[start..at]
        .iter()
        .rev()
        .take_while(|c| c.is_alphanumeric() || **c == '.')
        .collect::<Vec<_>>()
        .iter()
        .rev()
        .copied()
        .collect();
    let lower = word.to_lowercase();
    // "1." of a list stands at the beginning; at the end of a sentence a number may well stand.
    if lower.chars().all(|c| c.is_ascii_digit()) && !lower.is_empty() {
        return chars[start..at].iter().filter(|c| !c.is_whitespace()).count() == lower.len();
    }
    let initial = word.chars().count() == 1 && word.chars().all(char::is_uppercase);
    // "U.S. troops" goes on, "in the U.S. He" does not: what follows tells.
    let initials = word.contains('.') && word.split('.').all(|p| p.chars().count() <= 1);
    let follows = chars[at + 1..].iter().find(|c| !c.is_whitespace());
    let goes_on = follows.is_some_and(|c| c.is_lowercase() || c.is_ascii_digit() || *c == ',');
    (ABBREVIATIONS.contains(&lower.as_str()) && (goes_on || !ends_often(&lower)) && follows.is_some())
        || (initial && follows.is_some())
        || (initials && goes_on)
}

/// Abbreviations that end a sentence as often as not.
fn ends_often(word: &str) -> bool {
    matches!(word, "etc" | "usw" | "a.m" | "p.m" | "inc" | "ltd" | "co" | "al" | "no" | "m")
}

fn push(out: &mut Vec<String>, chars: &[char]) {
    let mut rest: Vec<char> =
        chars.iter().collect::<String>().split_whitespace().collect::<Vec<_>>().join(" ").chars().collect();
    while rest.len() > LONGEST {
        let half = LONGEST / 2;
        let at = |marks: &str| rest[half..LONGEST].iter().rposition(|c| marks.contains(*c)).map(|p| half + p + 1);
        let cut = at(",;:，、；：").or_else(|| at(" ")).unwrap_or(LONGEST);
        let tail = rest.split_off(cut);
        keep(out, &rest);
        rest = tail;
    }
    keep(out, &rest);
}

fn keep(out: &mut Vec<String>, chars: &[char]) {
    let piece: String = chars.iter().collect();
    let piece = piece.trim();
    if piece.chars().any(char::is_alphanumeric) {
        out.push(piece.to_string());
    }
}

#[cfg(test)]
mod tests {
    use super::sentences;

    #[test]
    fn sentences_end_where_a_reader_would_say_so() {
        for (text, want) in [
            ("Hello there. How are you? Fine!", vec!["Hello there.", "How are you?", "Fine!"]),
            (
                "Mr. Smith met Dr. Jones at 3.15 p.m. on Jan. 5.",
                vec!["Mr. Smith met Dr. Jones at 3.15 p.m. on Jan. 5."],
            ),
            (
                "It costs 3.14 dollars. See example.org for more.",
                vec!["It costs 3.14 dollars.", "See example.org for more."],
            ),
            (
                "Apples, pears, etc. are cheap. We sell apples etc. They are good.",
                vec!["Apples, pears, etc. are cheap.", "We sell apples etc.", "They are good."],
            ),
            (
                "The U.S. economy grew. J. K. Rowling wrote it.",
                vec!["The U.S. economy grew.", "J. K. Rowling wrote it."],
            ),
            ("“Stop!” she said. (Really.) Yes…", vec!["“Stop!”", "she said.", "(Really.)", "Yes…"]),
            ("你好。今天天气很好！你呢？我3.5点来。", vec!["你好。", "今天天气很好！", "你呢？", "我3.5点来。"]),
            ("「好。」他说。OK", vec!["「好。」", "他说。", "OK"]),
            (
                "A heading\nThe text goes\non here.\n\n- one\n- two",
                vec!["A heading", "The text goes on here.", "- one", "- two"],
            ),
            ("It was 1984. Then came 1985.", vec!["It was 1984.", "Then came 1985."]),
            ("1. First thing. 2. Second thing.", vec!["1. First thing.", "2. Second thing."]),
            ("Wait... what?!", vec!["Wait...", "what?!"]),
            ("  \n ... !! ", vec![]),
            ("", vec![]),
        ] {
            assert_eq!(sentences(text), want, "{text}");
        }
    }

    #[test]
    fn long_ones_are_cut_and_nothing_is_lost() {
        let long = "word ".repeat(500) + "and, a comma, " + &"字".repeat(1000);
        let cut = sentences(&long);
        assert!(cut.iter().all(|s| s.chars().count() <= 300), "{:?}", cut.iter().map(|s| s.len()).collect::<Vec<_>>());
        let letters = |s: &str| s.chars().filter(|c| c.is_alphanumeric()).collect::<String>();
        assert_eq!(letters(&cut.concat()), letters(&long));
    }
}
