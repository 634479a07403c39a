//! Prompts to token ids: 50 in ten languages against ids that the public `tokenizers` library gave for the same small
//! vocabulary (trained on 45 of them), with untidy whitespace put in.

use loquent::model::umt5::Tokenizer;
use serde_json::Value;

const TOKENIZER: &[u8] = include_bytes!("../data/tokenizer.json");
const PROMPTS: &str = include_str!("../data/prompts.json");

fn cases() -> Vec<(String, Vec<u32>)> {
    let all: Vec<Value> = serde_json::from_str(PROMPTS).unwrap();
    let ids = |v: &Value| v["ids"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap() as u32).collect();
    all.iter().map(|v| (v["prompt"].as_str().unwrap().to_string(), ids(v))).collect()
}

#[test]
fn ids_equal_the_reference_tokenizers() {
    let tokenizer = Tokenizer::from_json(TOKENIZER, 512).unwrap();
    let cases = cases();
    assert_eq!(cases.len(), 50);
    for (prompt, ids) in cases {
        assert_eq!(tokenizer.encode(&prompt).unwrap(), ids, "{prompt}");
        let untidy = format!("  {}\n", prompt.replace(' ', " \t\u{a0}"));
        assert_eq!(tokenizer.encode(&untidy).unwrap(), ids, "{untidy}");
    }
}

#[test]
fn a_long_prompt_is_cut_and_keeps_its_end() {
    let tokenizer = Tokenizer::from_json(TOKENIZER, 8).unwrap();
    let (prompt, ids) = cases().swap_remove(3);
    let cut = tokenizer.encode(&prompt).unwrap();
    assert_eq!((cut.len(), &cut[..7], cut[7]), (8, &ids[..7], 1));
    assert_eq!(tokenizer.encode("").unwrap().last(), Some(&1));
    assert!(Tokenizer::from_json(b"{}", 8).is_err());
}

/// What Python's `ftfy` 6.3.1, `html.unescape` twice and whitespace collapse made of good and mis-decoded text.
const MENDED: &str = include_str!("../data/ftfy.json");

#[test]
fn most_prompts_are_mended_as_ftfy_mends_them() {
    let all: Vec<Value> = serde_json::from_str(MENDED).unwrap();
    let mut other = Vec::new();
    for v in &all {
        let (text, want) = (v["text"].as_str().unwrap(), v["clean"].as_str().unwrap());
        let got = loquent::model::umt5::clean::clean(text);
        if got != want {
            other.push(format!("{text:?} became {got:?}, ftfy makes {want:?}"));
        }
    }
    // Known to differ: text of which every letter alone could be meant (ftfy judges the whole), Windows-1250 and -1251,
    // terminal colours, digraphs.
    assert!(other.len() <= 19, "{} of {}:\n{}", other.len(), all.len(), other.join("\n"));
}
