//! Settings: the shipped file is the defaults, layers overrule each other in their order, errors name key and value.

use loquent::config::{Change, Config, key_of_variable};
use std::collections::BTreeSet;

const FILE: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/config/loquent.toml"));

fn change(key: &str, value: &str) -> Change {
    Change { origin: "--set".into(), key: key.into(), value: value.into() }
}

fn layered(changes: &[Change]) -> Result<Config, String> {
    Config::layered(None, changes).map_err(|e| e.to_string())
}

/// `section.key` of every line of the file, also of those that are commented out because they have no default.
fn keys_of_file() -> BTreeSet<String> {
    let mut section = String::new();
    let mut keys = BTreeSet::new();
    for line in FILE.lines() {
        let line = line.strip_prefix("# ").filter(|l| is_setting(l)).unwrap_or(line);
        if let Some(name) = line.strip_prefix('[').and_then(|l| l.strip_suffix(']')) {
            section = name.into();
        } else if is_setting(line) {
            let key = line.split(" = ").next().unwrap();
            assert!(keys.insert(format!("{section}.{key}")), "{section}.{key} stands twice");
        }
    }
    keys
}

fn is_setting(line: &str) -> bool {
    line.split_once(" = ").is_some_and(|(key, _)| key.chars().all(|c| c.is_ascii_lowercase() || c == '_'))
}

#[test]
fn the_shipped_file_equals_the_defaults_and_names_every_key() {
    let file = Config::layered(Some(("config/loquent.toml", FILE)), &[]).unwrap();
    assert_eq!(file, Config::default());
    let defaults: BTreeSet<String> = Config::keys().into_iter().collect();
    assert!(defaults.len() > 40, "{defaults:?}");
    let file = keys_of_file();
    let missing: Vec<_> = defaults.difference(&file).collect();
    let unknown: Vec<_> = file.difference(&defaults).collect();
    assert!(missing.is_empty() && unknown.is_empty(), "not in the file: {missing:?}; not in the code: {unknown:?}");
}

#[test]
fn every_setting_has_a_consequence_above_it() {
    let mut commented = false;
    for line in FILE.lines() {
        if line.starts_with('#') {
            commented = true;
        } else if is_setting(line) {
            // Keys of a pair (a floor and a ceiling) may share one comment.
            assert!(commented, "no comment above: {line}");
        } else {
            commented = false;
        }
        assert!(line.len() <= 120, "longer than 120 columns: {line}");
    }
}

#[test]
fn the_defaults_are_usable_and_survive_printing() {
    let defaults = Config::default();
    defaults.validate().unwrap();
    let printed = defaults.to_toml().unwrap();
    assert_eq!(Config::layered(Some(("printed", &printed)), &[]).unwrap(), defaults);
}

#[test]
fn later_layers_overrule_earlier_ones() {
    let file = "[server]\nlisten = \"127.0.0.1:1\"\n[engine]\nsessions = 2\n";
    let changes = [change("server.listen", "127.0.0.1:2"), change("server.listen", "127.0.0.1:3")];
    let config = Config::layered(Some(("f", file)), &changes).unwrap();
    assert_eq!(config.server.listen, "127.0.0.1:3");
    assert_eq!(config.engine.sessions, 2);
    assert_eq!(config.net, Config::default().net);
}

#[test]
fn values_are_read_as_the_kind_that_stands_there() {
    let config = layered(&[
        change("engine.sessions", "3"),
        change("engine.steps", "4"),
        change("net.ice_tcp", "true"),
        change("server.cors_origins", "https://a.example, https://b.example"),
        change("net.public_ips", "[\"192.0.2.1\"]"),
        change("net.ice_servers", "[{ urls = [\"stun:stun.example.net\"] }]"),
        change("log.filter", "debug"),
        change("log.format", "json"),
    ])
    .unwrap();
    assert_eq!(config.engine.sessions, 3);
    assert_eq!(config.engine.steps, Some(4));
    assert!(config.net.ice_tcp);
    assert_eq!(config.server.cors_origins, ["https://a.example", "https://b.example"]);
    assert_eq!(config.net.public_ips, ["192.0.2.1".parse::<std::net::IpAddr>().unwrap()]);
    assert_eq!(config.net.ice_servers[0].urls, ["stun:stun.example.net"]);
    assert_eq!(config.log.filter, "debug");
}

#[test]
fn variables_name_settings() {
    assert_eq!(key_of_variable("LOQUENT__SERVER__LISTEN").as_deref(), Some("server.listen"));
    assert_eq!(key_of_variable("LOQUENT__ENGINE__RETRY_AFTER_S").as_deref(), Some("engine.retry_after_s"));
    assert_eq!(key_of_variable("HOME"), None);
}

#[test]
fn what_is_wrong_is_named_with_key_value_and_origin() {
    let says = |result: Result<Config, String>, parts: &[&str]| {
        let text = result.unwrap_err();
        for part in parts {
            assert!(text.contains(part), "`{part}` is missing in: {text}");
        }
    };
    says(layered(&[change("server.lisen", "x")]), &["--set", "server.lisen", "did you mean `server.listen`"]);
    says(layered(&[change("server", "x")]), &["--set", "`server`"]);
    says(layered(&[change("nonsense.entirely.else", "x")]), &["loquent config default"]);
    says(layered(&[change("engine.sessions", "many")]), &["engine.sessions = many"]);
    says(layered(&[change("log.format", "xml")]), &["log.format = xml", "text", "json"]);
    let file = |text: &str| Config::layered(Some(("my.toml", text)), &[]).map_err(|e| e.to_string());
    says(file("[server]\nlisten = 5\n"), &["my.toml", "line 2", "listen"]);
    says(file("[server]\nlsten = \"\"\n"), &["my.toml", "line 2", "lsten", "listen"]);
    says(file("server = [\n"), &["my.toml"]);

    let invalid = |changes: &[Change]| {
        layered(changes).unwrap().validate().map(|()| Config::default()).map_err(|e| e.to_string())
    };
    says(invalid(&[change("server.listen", "here")]), &["server.listen", "\"here\"", "127.0.0.1:8080"]);
    says(invalid(&[change("server.listen", "0.0.0.0:80")]), &["0.0.0.0:80", "loquent key new", "HTTPS"]);
    says(invalid(&[change("server.cors_origins", "a.example")]), &["server.cors_origins", "a.example", "https://"]);
    says(invalid(&[change("server.header_timeout_s", "0")]), &["server.header_timeout_s = 0", "1 or more"]);
    says(invalid(&[change("server.web_dir", "/no/such/dir")]), &["server.web_dir", "/no/such/dir"]);
    says(invalid(&[change("engine.sessions", "0")]), &["engine.sessions = 0", "1 to 64"]);
    says(invalid(&[change("log.filter", "loquent=shout")]), &["log.filter", "shout"]);
    says(invalid(&[change("net.port_min", "7000")]), &["[net]", "port_max"]);
    let key = format!("1a2b3c4d shop control {}", "0".repeat(64));
    let key = format!("[\"{key}\"]");
    assert!(invalid(&[change("server.listen", "0.0.0.0:80"), change("server.keys", &key)]).is_ok());
    says(invalid(&[change("server.keys", "lq_secret")]), &["server.keys", "ID NAME SCOPES SHA256"]);
    says(invalid(&[change("server.keys_file", "/no/such")]), &["server.keys_file", "/no/such", "loquent key new"]);
    assert!(invalid(&[change("server.listen", "localhost:80")]).is_ok());
}
