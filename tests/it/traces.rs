//! The way of a block as an OpenTelemetry collector gets it: the program itself, and a collector of the test's own.

use crate::{access::Program, sessions::Socket};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Read, Write},
    net::TcpListener,
    sync::mpsc,
    time::{Duration, Instant},
};

/// Takes what is posted and answers as a collector does.
fn collector() -> (String, mpsc::Receiver<Value>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}/v1/traces", listener.local_addr().unwrap());
    let (taken, requests) = mpsc::channel();
    std::thread::spawn(move || {
        for socket in listener.incoming().map_while(Result::ok) {
            let taken = taken.clone();
            std::thread::spawn(move || {
                let mut reader = BufReader::new(socket);
                loop {
                    let (mut line, mut length, mut head) = (String::new(), 0, String::new());
                    while reader.read_line(&mut line).is_ok_and(|n| n > 2) {
                        let lower = line.to_ascii_lowercase();
                        length = lower.strip_prefix("content-length:").map_or(length, |n| n.trim().parse().unwrap());
                        head.push_str(&lower);
                        line.clear();
                    }
                    if head.is_empty() {
                        return;
                    }
                    assert!(head.starts_with("post /v1/traces") && head.contains("content-type: application/json"));
                    let mut body = vec![0; length];
                    reader.read_exact(&mut body).unwrap();
                    reader.get_mut().write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}").unwrap();
                    if taken.send(serde_json::from_slice(&body).unwrap()).is_err() {
                        return;
                    }
                }
            });
        }
    });
    (address, requests)
}

fn attribute<'a>(span: &'a Value, key: &str) -> &'a Value {
    let all = span["attributes"].as_array().unwrap();
    all.iter().find(|a| a["key"] == key).map_or(&Value::Null, |a| &a["value"])
}

fn time(span: &Value, key: &str) -> u64 {
    span[key].as_str().unwrap().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collector_gets_the_way_of_every_block() {
    let (address, requests) = collector();
    let program = Program::start(
        "traces",
        "",
        &["--set", &format!("log.traces={address}"), "--set", "server.recordings_dir=films"],
    );
    let session = program.json("POST", "/v1/sessions", "");
    let id = session["id"].as_str().unwrap();
    let mut socket = Socket::to(&program.address, &session).await;
    socket.say(json!({"type": "set", "rate": 16_000})).await;
    socket.sound(2000).await;
    // Something to be encoded for: a recorder watches.
    let bearer = format!("Authorization: Bearer {}\r\n", session["token"].as_str().unwrap());
    let began = program.ask("POST", &format!("/v1/sessions/{id}/recording"), &bearer);
    assert!(began.starts_with("HTTP/1.1 2"), "{began}");
    let (mut spans, begun) = (Vec::new(), Instant::now());
    let named = |spans: &[Value], name: &str| spans.iter().filter(|s| s["name"] == name).count();
    while named(&spans, "send") < 10 {
        assert!(begun.elapsed() < Duration::from_secs(30), "{} spans came: {}", spans.len(), program.log());
        let Ok(request) = requests.recv_timeout(Duration::from_secs(1)) else { continue };
        let resource = &request["resourceSpans"][0];
        assert_eq!(attribute(&resource["resource"], "service.name")["stringValue"], "loquent");
        spans.extend(resource["scopeSpans"][0]["spans"].as_array().unwrap().iter().cloned());
    }
    let mut traces = BTreeMap::<&str, Vec<&Value>>::new();
    for span in &spans {
        let (trace, own) = (span["traceId"].as_str().unwrap(), span["spanId"].as_str().unwrap());
        assert!(
            trace.len() == 32
                && own.len() == 16
                && [trace, own].iter().all(|i| i.chars().all(|c| c.is_ascii_hexdigit()))
        );
        // Enough of the id to find it in the log, never all of it.
        let told = attribute(span, "session.id")["stringValue"].as_str().unwrap();
        assert!(id.starts_with(told) && told.len() == 8, "{told}");
        assert!(time(span, "startTimeUnixNano") <= time(span, "endTimeUnixNano"), "{span}");
        traces.entry(trace).or_default().push(span);
    }
    let mut indices = Vec::new();
    for spans in traces.values() {
        let roots: Vec<_> = spans.iter().filter(|s| s["parentSpanId"] == "").collect();
        let [root] = roots[..] else { panic!("{} roots", roots.len()) };
        assert_eq!(root["name"], "block");
        indices.push(attribute(root, "block.index")["intValue"].as_str().unwrap().parse::<u64>().unwrap());
        let parts: Vec<_> = spans.iter().filter(|s| s["parentSpanId"] == root["spanId"]).collect();
        assert_eq!(parts.len() + 1, spans.len(), "every span hangs on its block");
        let names: Vec<_> = parts.iter().map(|s| s["name"].as_str().unwrap()).collect();
        let shown = attribute(root, "block.pictures")["intValue"] != "0";
        assert_eq!(names[..4], ["ingest", "features", "steps", "decode"]);
        assert_eq!(names[4..], if shown { vec!["encode", "send"] } else { vec![] });
        for pair in parts.windows(2) {
            let order = [&pair[0], &pair[1]].map(|s| time(s, "startTimeUnixNano"));
            assert!(order[0] <= order[1], "{pair:?}");
        }
        assert!(parts.iter().all(|s| time(s, "startTimeUnixNano") >= time(root, "startTimeUnixNano")));
    }
    indices.sort_unstable();
    assert!(indices.windows(2).all(|i| i[1] == i[0] + 1), "no block is missing: {indices:?}");
    let metrics = program.ask("GET", "/metrics", "");
    let sent = metrics.lines().find_map(|l| l.strip_prefix("loquent_trace_blocks_total{outcome=\"sent\"} ")).unwrap();
    assert!(sent.parse::<f64>().unwrap() >= indices.len() as f64, "{sent}");
}

/// Nobody there: the service speaks on, the counter tells what is missing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collector_that_is_not_there_costs_traces_only() {
    let program = Program::start("no-traces", "", &["--set", "log.traces=http://127.0.0.1:9/v1/traces"]);
    let mut socket = Socket::to(&program.address, &program.json("POST", "/v1/sessions", "")).await;
    crate::faults::speaks(&mut socket).await;
    let begun = Instant::now();
    while !program
        .ask("GET", "/metrics", "")
        .lines()
        .any(|l| l.strip_prefix("loquent_trace_blocks_total{outcome=\"failed\"} ").is_some_and(|n| n != "0"))
    {
        assert!(begun.elapsed() < Duration::from_secs(30), "{}", program.log());
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    crate::faults::speaks(&mut socket).await;
    assert_eq!(program.log().matches("traces cannot be sent").count(), 1, "{}", program.log());
}
