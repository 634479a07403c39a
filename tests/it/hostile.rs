//! Hostile and malformed input at every door of a running service: SDP, SDP fragments, pictures, HTTP itself, and bytes
//! at the media socket; sound files at the reader. Each ends in a clear answer or a counted drop, none in a panic, a
//! hang or a leak. All mutations come from fixed seeds, so a failure names the input that caused it.

use loquent::codec::audio_file::{Limits, Source, read_speech};
use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream, UdpSocket},
    path::Path,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

/// Longest any single answer may take; beyond it the service hangs.
const PATIENCE: Duration = Duration::from_secs(15);

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    fn below(&mut self, n: usize) -> usize {
        (self.next() >> 11) as usize % n.max(1)
    }
    fn bytes(&mut self, n: usize) -> Vec<u8> {
        (0..n).map(|_| self.next() as u8).collect()
    }
}

/// One of a dozen ways to spoil bytes.
fn spoil(original: &[u8], seed: u64) -> Vec<u8> {
    let mut random = Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
    let mut out = original.to_vec();
    for _ in 0..1 + random.below(3) {
        let at = random.below(out.len());
        match random.below(9) {
            0 => out.truncate(at),
            1 if !out.is_empty() => out[at] ^= 1 << random.below(8),
            2 if !out.is_empty() => out[at] = random.next() as u8,
            3 => {
                let n = random.below(64);
                let noise = random.bytes(n);
                out.splice(at..at, noise);
            }
            4 => {
                let end = (at + random.below(200)).min(out.len());
                out.drain(at..end);
            }
            5 => {
                let end = (at + random.below(400)).min(out.len());
                let again = out[at..end].to_vec();
                out.splice(at..at, again);
            }
            6 if out.len() > 8 => {
                let at = at.min(out.len() - 4);
                let number = [0, u32::MAX, 0x7fff_ffff, 0x8000_0000, 1][random.below(5)];
                out[at..at + 4].copy_from_slice(&number.to_be_bytes());
            }
            7 => {
                let end = (at + 1 + random.below(30)).min(out.len());
                out[at..end].fill(0);
            }
            _ => {
                let at2 = random.below(out.len());
                let (a, b) = (at.min(at2), at.max(at2));
                out[a..b].reverse();
            }
        }
    }
    out
}

/// Spoils text line by line: fields emptied, made huge or negative, lines dropped, doubled, swapped.
fn spoil_lines(original: &str, seed: u64) -> String {
    let mut random = Random(seed.wrapping_mul(0xD134_2543_DE82_EF95) | 1);
    let mut lines: Vec<String> = original.lines().map(str::to_string).collect();
    for _ in 0..1 + random.below(3) {
        let at = random.below(lines.len());
        match random.below(8) {
            0 => drop(lines.remove(at)),
            1 => lines.insert(at, lines[at].clone()),
            2 => {
                let other = random.below(lines.len());
                lines.swap(at, other);
            }
            3 => lines[at] = lines[at].replace(|c: char| c.is_ascii_digit(), "9"),
            4 => lines[at] = format!("{} {}", lines[at], "9".repeat(400)),
            5 => lines[at] = lines[at].split_once([':', '=']).map_or(String::new(), |(k, _)| format!("{k}:")),
            6 => {
                let word = ["-1", "0", "99999999999999999999", "ÿ\u{0}\u{7f}", "a=b=c", ""][random.below(6)];
                let mut words: Vec<&str> = lines[at].split(' ').collect();
                let which = random.below(words.len());
                words[which] = word;
                lines[at] = words.join(" ");
            }
            _ => lines[at] = lines[at].chars().rev().collect(),
        }
        if lines.is_empty() {
            break;
        }
    }
    lines.join("\r\n") + "\r\n"
}

/// The service as a user starts it; killed when dropped.
struct House {
    child: Child,
    address: SocketAddr,
    log: Arc<Mutex<String>>,
}

impl Drop for House {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl House {
    fn open() -> House {
        let mut child = Command::new(env!("CARGO_BIN_EXE_loquent"))
            .args(["serve", "--engine", "card", "--listen", "127.0.0.1:0", "--sessions", "2", "--stop-after", "300"])
            .env("LOQUENT__NET__BIND", "127.0.0.1")
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log = Arc::new(Mutex::new(String::new()));
        let (stderr, kept) = (child.stderr.take().unwrap(), log.clone());
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                let mut log = kept.lock().unwrap();
                log.push_str(&line);
                log.push('\n');
            }
        });
        let mut told = BufReader::new(child.stdout.take().unwrap()).lines();
        let address = loop {
            let line = told.next().expect("the service ended before it was ready").unwrap();
            if let Some(at) = line.find("http://127.0.0.1:") {
                let port: String = line[at + 17..].chars().take_while(char::is_ascii_digit).collect();
                break SocketAddr::from(([127, 0, 0, 1], port.parse().unwrap()));
            }
        };
        // Keep reading, or the service would wait for us.
        std::thread::spawn(move || told.for_each(drop));
        House { child, address, log }
    }

    /// Sends raw bytes, returns whatever came back before the end of the connection. `end` says that nothing more will
    /// come, which also cancels what is being done: for input that may be half a request.
    fn raw(&self, bytes: &[u8], end: bool) -> Vec<u8> {
        let mut socket = TcpStream::connect(self.address).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.set_write_timeout(Some(PATIENCE)).unwrap();
        // Refusals may close the connection before everything was sent.
        let _ = socket.write_all(bytes);
        if end {
            let _ = socket.shutdown(std::net::Shutdown::Write);
        }
        let mut out = Vec::new();
        let mut part = [0; 16_384];
        loop {
            match socket.read(&mut part) {
                Ok(0) => break,
                Ok(n) => out.extend_from_slice(&part[..n]),
                Err(e) if matches!(e.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {
                    panic!("the service hangs on {:?}", String::from_utf8_lossy(&bytes[..bytes.len().min(300)]))
                }
                Err(_) => break,
            }
        }
        out
    }

    fn ask(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
        let mut bytes = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {}\r\n",
            body.len()
        );
        for (name, value) in headers {
            bytes += &format!("{name}: {value}\r\n");
        }
        let mut bytes = (bytes + "\r\n").into_bytes();
        bytes.extend_from_slice(body);
        let back = self.raw(&bytes, false);
        let text = String::from_utf8_lossy(&back).into_owned();
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
        let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or(0);
        let headers = head.lines().filter_map(|l| l.split_once(": ")).map(|(k, v)| (k.to_ascii_lowercase(), v.into()));
        Answer { status, headers: headers.collect(), body: body.into() }
    }

    /// Frees whatever session an accepted offer opened.
    fn leave(&self, answer: &Answer) {
        if answer.status == 201 {
            let gone = self.ask("DELETE", &answer.headers["location"], &[], b"");
            assert_eq!(gone.status, 200, "{}", gone.body);
        }
    }

    fn offer(&self, sdp: &[u8]) -> Answer {
        self.ask("POST", "/v1/live", &[("Content-Type", "application/sdp")], sdp)
    }

    fn proc(&self, file: &str) -> String {
        std::fs::read_to_string(format!("/proc/{}/{file}", self.child.id())).unwrap()
    }
    fn memory_mib(&self) -> f64 {
        self.proc("statm").split(' ').nth(1).unwrap().parse::<f64>().unwrap() * 4096.0 / f64::from(1 << 20)
    }
    fn threads(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap().count()
    }
    fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap().count()
    }

    /// The service still answers, admits a normal offer, and has said nothing of a panic.
    fn well(&self, after: &str) {
        assert_eq!(self.ask("GET", "/healthz", &[], b"").status, 200, "not well after {after}");
        let log = self.log.lock().unwrap();
        assert!(!log.contains("panicked"), "a panic after {after}:\n{log}");
    }
}

struct Answer {
    status: u16,
    headers: BTreeMap<String, String>,
    body: String,
}

impl Answer {
    /// A refusal is a 4xx with a sentence.
    fn is_clear(&self) -> bool {
        (400..500).contains(&self.status) && (self.body.contains("message") || self.body.contains(' '))
    }
}

/// What a browser offers: microphone, picture, data channel.
fn offer() -> String {
    let print = vec!["AB"; 32].join(":");
    let transport = format!(
        "c=IN IP4 0.0.0.0\r\na=rtcp:9 IN IP4 0.0.0.0\r\na=ice-ufrag:Qm9v\r\na=ice-pwd:MTIzNDU2Nzg5MDEyMzQ1Njc4OTAxMg\r\n\
         a=ice-options:trickle\r\na=fingerprint:sha-256 {print}\r\na=setup:actpass\r\n"
    );
    format!(
        "v=0\r\no=- 4611731400430051336 2 IN IP4 127.0.0.1\r\ns=-\r\nt=0 0\r\na=group:BUNDLE 0 1 2\r\n\
         a=extmap-allow-mixed\r\na=msid-semantic: WMS s\r\n\
         m=audio 9 UDP/TLS/RTP/SAVPF 111 110\r\n{transport}a=mid:0\r\na=extmap:1 urn:ietf:params:rtp-hdrext:sdes:mid\r\n\
         a=sendrecv\r\na=msid:s t\r\na=rtcp-mux\r\na=rtpmap:111 opus/48000/2\r\na=rtcp-fb:111 transport-cc\r\n\
         a=fmtp:111 minptime=10;useinbandfec=1\r\na=rtpmap:110 telephone-event/48000\r\na=ssrc:1 cname:c\r\n\
         m=video 9 UDP/TLS/RTP/SAVPF 108 109\r\n{transport}a=mid:1\r\na=recvonly\r\na=rtcp-mux\r\na=rtcp-rsize\r\n\
         a=rtpmap:108 H264/90000\r\na=rtcp-fb:108 nack\r\na=rtcp-fb:108 nack pli\r\na=rtcp-fb:108 transport-cc\r\n\
         a=fmtp:108 level-asymmetry-allowed=1;packetization-mode=1;profile-level-id=42e01f\r\na=rtpmap:109 rtx/90000\r\n\
         a=fmtp:109 apt=108\r\nm=application 9 UDP/DTLS/SCTP webrtc-datachannel\r\n{transport}a=mid:2\r\n\
         a=sctp-port:5000\r\na=max-message-size:262144\r\n"
    )
}

fn fragment() -> String {
    "a=ice-ufrag:Qm9v\r\na=ice-pwd:MTIzNDU2Nzg5MDEyMzQ1Njc4OTAxMg\r\nm=audio 9 UDP/TLS/RTP/SAVPF 111\r\na=mid:0\r\n\
     a=candidate:1 1 udp 2113937151 127.0.0.1 9 typ host\r\na=candidate:2 1 tcp 1518280447 127.0.0.1 9 typ host tcptype active\r\n\
     a=end-of-candidates\r\n"
        .into()
}

/// A datagram of one of the kinds that share a media socket (RFC 7983), spoilt.
fn datagram(random: &mut Random) -> Vec<u8> {
    let n = random.below(1400);
    let mut body = random.bytes(n);
    let mut head = match random.below(6) {
        // STUN binding request with a cookie and a length that may lie.
        0 => {
            let length = [body.len() as u16 & !3, 0xffff, 0, 4][random.below(4)];
            let mut head = vec![0, 1];
            head.extend(length.to_be_bytes());
            head.extend(0x2112_a442u32.to_be_bytes());
            head.extend(random.bytes(12));
            // USERNAME with a lying length.
            head.extend([0, 6, 0xff, 0xf0]);
            head
        }
        // DTLS records: handshake, alert, application data.
        1 => vec![
            [20, 21, 22, 23, 63][random.below(5)],
            0xfe,
            [0xff, 0xfd][random.below(2)],
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            1,
            0xff,
            0xff,
            1,
        ],
        // RTP with every flag and count.
        2 => vec![0x80 | (random.next() as u8 & 0x3f), random.next() as u8, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1],
        // RTCP of each kind, with a length in words that may lie.
        3 => vec![0x80 | (random.next() as u8 & 0x3f), 200 + random.below(8) as u8, 0xff, 0xff, 0, 0, 0, 1],
        4 => vec![],
        _ => vec![random.next() as u8],
    };
    if random.below(8) == 0 {
        body.clear();
    }
    head.append(&mut body);
    head
}

#[test]
fn hostile_input_is_refused_or_dropped_and_leaves_no_trace() {
    let house = House::open();
    let mut inputs = 0;
    // A first round of everything, so that caches and pools are filled before anything is compared.
    let normal = house.offer(offer().as_bytes());
    assert_eq!(normal.status, 201, "a normal offer must be taken: {}", normal.body);
    house.leave(&normal);

    let rounds = |house: &House, from: u64, inputs: &mut usize| {
        offers(house, from, inputs);
        fragments(house, from, inputs);
        pictures(house, from, inputs);
        requests(house, from, inputs);
        media(house, from, inputs);
    };
    rounds(&house, 1, &mut inputs);
    std::thread::sleep(Duration::from_secs(2));
    let (memory, threads, descriptors) = (house.memory_mib(), house.threads(), house.descriptors());
    rounds(&house, 100_000, &mut inputs);
    // Closing a session takes a moment.
    let settled = Instant::now();
    while (house.threads() > threads || house.descriptors() > descriptors)
        && settled.elapsed() < Duration::from_secs(10)
    {
        std::thread::sleep(Duration::from_millis(200));
    }
    assert!(house.threads() <= threads, "threads: {threads} → {}", house.threads());
    assert!(house.descriptors() <= descriptors, "open files and sockets: {descriptors} → {}", house.descriptors());
    let grown = house.memory_mib() - memory;
    assert!(grown < 24.0, "memory grew by {grown:.1} MiB in the second round");
    // And it still does its work.
    let normal = house.offer(offer().as_bytes());
    assert_eq!(normal.status, 201, "a normal offer must still be taken: {}", normal.body);
    house.leave(&normal);
    println!("{inputs} hostile inputs; memory {memory:.1} MiB, grown by {grown:.1} MiB in the second half");
    assert!(inputs >= 500, "only {inputs} inputs");
}

fn offers(house: &House, from: u64, inputs: &mut usize) {
    let good = offer();
    let mut cases: Vec<Vec<u8>> = (from..from + 60).map(|seed| spoil_lines(&good, seed).into_bytes()).collect();
    cases.extend((from..from + 60).map(|seed| spoil(good.as_bytes(), seed)));
    cases.extend([
        vec![],
        b"v=0".to_vec(),
        vec![0; 4000],
        vec![b'\n'; 60_000],
        good.replace("H264/90000", "VP8/90000").into_bytes(),
        good.replace("opus/48000/2", "PCMU/8000").into_bytes(),
        good.replace("a=fingerprint", "a=nothing").into_bytes(),
        good.replace("a=ice-ufrag", "a=nothing").into_bytes(),
        good.replace("a=sendrecv", "a=inactive").into_bytes(),
        good.replace("sha-256", "md5").into_bytes(),
        good.replace("AB:AB", "ZZ:ZZ").into_bytes(),
        good.repeat(3).into_bytes(),
        (good.clone() + &"m=video 9 UDP/TLS/RTP/SAVPF 108\r\n".repeat(500)).into_bytes(),
        (good.clone() + &format!("a=x:{}\r\n", "y".repeat(50_000))).into_bytes(),
        vec![b'x'; 3_000_000],
        b"{\"type\":\"offer\",\"sdp\":\"v=0\"}".to_vec(),
    ]);
    for (i, case) in cases.iter().enumerate() {
        let answer = house.offer(case);
        // A spoilt line may be one that does not matter.
        let fine = answer.status == 201 || answer.is_clear();
        assert!(fine, "offer {i} of seed {from}: {} {}\n{}", answer.status, answer.body, String::from_utf8_lossy(case));
        house.leave(&answer);
    }
    *inputs += cases.len();
    house.well("offers");
}

fn fragments(house: &House, from: u64, inputs: &mut usize) {
    let session = house.offer(offer().as_bytes());
    assert_eq!(session.status, 201, "{}", session.body);
    let place = &session.headers["location"];
    let etag = session.headers.get("etag").cloned().unwrap_or_default();
    let kind = ("Content-Type", "application/trickle-ice-sdpfrag");
    let mut cases: Vec<Vec<u8>> = (from..from + 40).map(|seed| spoil_lines(&fragment(), seed).into_bytes()).collect();
    cases.extend((from..from + 30).map(|seed| spoil(fragment().as_bytes(), seed)));
    cases.extend([vec![], vec![0xff; 500], fragment().repeat(300).into_bytes(), vec![b'a'; 1_000_000]]);
    for (i, case) in cases.iter().enumerate() {
        let tag = ["*", etag.as_str(), "\"stale\"", ""][i % 4];
        let mut headers = vec![kind];
        if !tag.is_empty() {
            headers.push(("If-Match", tag));
        }
        let answer = house.ask("PATCH", place, &headers, case);
        let fine = matches!(answer.status, 200 | 204) || answer.is_clear();
        let text = String::from_utf8_lossy(case);
        assert!(fine, "fragment {i} of seed {from} (If-Match {tag}): {} {}\n{text}", answer.status, answer.body);
    }
    for (method, path, headers) in [
        ("PATCH", place.as_str(), vec![("Content-Type", "text/plain")]),
        ("PATCH", "/v1/live/nobody", vec![kind]),
        ("DELETE", "/v1/live/nobody", vec![]),
        ("DELETE", "/v1/live/%ff%fe", vec![]),
        ("PUT", place.as_str(), vec![]),
    ] {
        let answer = house.ask(method, path, &headers, b"a=x\r\n");
        assert!((400..500).contains(&answer.status), "{method} {path}: {}", answer.status);
        *inputs += 1;
    }
    *inputs += cases.len();
    house.leave(&session);
    house.well("fragments");
}

fn pictures(house: &House, from: u64, inputs: &mut usize) {
    let mut good = Vec::new();
    for format in [image::ImageFormat::Png, image::ImageFormat::Jpeg, image::ImageFormat::WebP] {
        let picture = image::RgbImage::from_fn(96, 96, |x, y| image::Rgb([x as u8 * 2, y as u8 * 2, (x ^ y) as u8]));
        let mut bytes = std::io::Cursor::new(Vec::new());
        image::DynamicImage::ImageRgb8(picture).write_to(&mut bytes, format).unwrap();
        good.push(bytes.into_inner());
    }
    let mut cases: Vec<Vec<u8>> = (from..from + 60).map(|seed| spoil(&good[seed as usize % 3], seed)).collect();
    // A PNG of 60 000 × 60 000 pixels by its header only.
    let mut bomb = good[0].clone();
    bomb[16..20].copy_from_slice(&60_000u32.to_be_bytes());
    bomb[20..24].copy_from_slice(&60_000u32.to_be_bytes());
    cases.extend([
        vec![],
        b"GIF89a".to_vec(),
        bomb,
        vec![0; 5000],
        b"<svg xmlns='http://www.w3.org/2000/svg'/>".to_vec(),
    ]);
    for (i, case) in cases.iter().enumerate() {
        let answer = house.ask("POST", "/v1/portraits?consent=test", &[("Content-Type", "image/png")], case);
        let fine = answer.status == 201 || answer.is_clear();
        assert!(fine, "picture {i} of seed {from}: {} {}", answer.status, answer.body);
    }
    let huge = house.ask("POST", "/v1/portraits", &[("Content-Type", "image/png")], &vec![7; 40_000_000]);
    assert!(huge.status == 413 || huge.status == 0, "40 MB: {}", huge.status);
    *inputs += cases.len() + 1;
    house.well("pictures");
}

fn requests(house: &House, from: u64, inputs: &mut usize) {
    let good = format!(
        "POST /v1/live?presenter=card HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/sdp\r\nContent-Length: 5\r\n\
         Connection: close\r\n\r\nv=0\r\n"
    );
    let mut cases: Vec<Vec<u8>> = (from..from + 40).map(|seed| spoil(good.as_bytes(), seed)).collect();
    let header =
        |h: &str| format!("GET / HTTP/1.1\r\nHost: localhost\r\n{h}\r\nConnection: close\r\n\r\n").into_bytes();
    cases.extend([
        header(&format!("X: {}", "y".repeat(200_000))),
        header(&"X: y\r\n".repeat(500)),
        header("Content-Length: -1"),
        header("Content-Length: 99999999999999999999"),
        header("Transfer-Encoding: chunked, chunked"),
        b"GET /../../etc/passwd HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".to_vec(),
        b"GET /%2e%2e/Cargo.toml HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".to_vec(),
        b"GET /v1/presenters/..%2f..%2fx.png HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".to_vec(),
        b"GET /v1/live?presenter=%00 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".to_vec(),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec(),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(),
        vec![],
    ]);
    for case in &cases {
        let back = house.raw(case, true);
        let text = String::from_utf8_lossy(&back);
        assert!(!text.contains("root:") && !text.contains("[package]"), "a file of the machine was served: {text}");
        assert!(!text.starts_with("HTTP/1.1 5"), "{:?} was answered with {text}", String::from_utf8_lossy(case));
    }
    *inputs += cases.len();
    house.well("requests");
}

fn media(house: &House, from: u64, inputs: &mut usize) {
    let session = house.offer(offer().as_bytes());
    assert_eq!(session.status, 201, "{}", session.body);
    let candidate =
        session.body.lines().find(|l| l.starts_with("a=candidate") && l.to_ascii_lowercase().contains(" udp "));
    let words: Vec<&str> = candidate.expect("the answer names a UDP candidate").split(' ').collect();
    let to: SocketAddr = format!("{}:{}", words[4], words[5]).parse().unwrap();
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut random = Random(from | 1);
    let count = 200;
    for _ in 0..count {
        let _ = socket.send_to(&datagram(&mut random), to);
        if random.below(20) == 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    std::thread::sleep(Duration::from_millis(200));
    *inputs += count;
    house.well("datagrams");
    house.leave(&session);
}

#[test]
fn spoilt_sound_files_end_in_an_error_or_in_sound() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/data");
    let mut good: Vec<Vec<u8>> = ["tone.mp3", "tone.m4a", "tone.ogg", "tone.opus", "tone.flac", "tone-opus.mp4"]
        .iter()
        .map(|name| std::fs::read(folder.join(name)).unwrap())
        .collect();
    good.push(super::files::wav(16_000, &[1000; 4000]));
    let limits = Limits { longest: Duration::from_secs(60), ..Limits::default() };
    let (mut refused, mut read) = (0, 0);
    for seed in 1..=210u64 {
        let bytes = spoil(&good[seed as usize % good.len()], seed);
        let began = Instant::now();
        let name = seed;
        match std::panic::catch_unwind(|| read_speech(&Source::from(bytes), &limits)) {
            Ok(Ok((pcm, _))) => {
                assert!(pcm.samples.iter().all(|s| s.is_finite()), "seed {name} gives sound that is no number");
                read += 1;
            }
            Ok(Err(error)) => {
                assert!(error.to_string().len() > 20, "seed {name}: no sentence: {error}");
                refused += 1;
            }
            Err(_) => panic!("seed {name} panics"),
        }
        assert!(began.elapsed() < Duration::from_secs(10), "seed {name} takes {:?}", began.elapsed());
    }
    println!("{refused} refused, {read} read");
    assert!(refused > 20 && read > 20);
}

#[test]
fn sound_of_more_channels_than_there_are_gets_a_sentence() {
    // The decoder multiplies them in 16 bits (symphonia-format-riff 0.6.1): where overflow is checked, it panics.
    for channels in [0u16, 27, 0x8000, 0xfffa] {
        let mut wav = super::files::wav(16_000, &[1000; 4000]);
        wav[22..24].copy_from_slice(&channels.to_le_bytes());
        let error = read_speech(&Source::from(wav), &Limits::default()).expect_err("no such file can be read");
        println!("{channels} channels: {error}");
        assert!(error.to_string().starts_with("the uploaded sound is"), "{channels} channels: {error}");
    }
}
