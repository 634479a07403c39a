//! The WebRTC room against a client of the test tree, on loopback.

use crate::peer::{Client, SPEECH_SSRC};
use loquent::{
    media::MediaTime,
    net::{Config, Data, DataChannelSpec, Net, NetError, Peer},
    session::{EncodedAudio, EncodedVideo, LinkEvent, LinkOut},
};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::mpsc;

fn config() -> Config {
    Config { bind: vec!["127.0.0.1".parse().unwrap()], ..Config::default() }
}

struct Live {
    client: Client,
    peer: Peer,
    events: mpsc::Receiver<LinkEvent>,
    out: Arc<dyn LinkOut>,
    took: Duration,
}

async fn connect(net: &Net) -> Live {
    let mut client = Client::new().await;
    let offer = client.offer().await;
    let began = Instant::now();
    let ((peer, mut events, out), answer) = net.answer_live(&offer).await.expect("answered");
    client.accept(&answer).await;
    assert!(client.connected(Duration::from_secs(5)).await, "the client connects");
    until(&mut events, |e| matches!(e, LinkEvent::Connected)).await.expect("we are connected");
    Live { client, peer, events, out, took: began.elapsed() }
}

/// The next event that `wanted` likes, within 5 s.
async fn until(
    events: &mut mpsc::Receiver<LinkEvent>,
    mut wanted: impl FnMut(&LinkEvent) -> bool,
) -> Option<LinkEvent> {
    let search = async {
        while let Some(event) = events.recv().await {
            if wanted(&event) {
                return Some(event);
            }
        }
        None
    };
    tokio::time::timeout(Duration::from_secs(5), search).await.ok().flatten()
}

/// An access unit of `size` bytes: parameter sets and an IDR slice, or one plain slice.
fn unit(n: i64, keyframe: bool, size: usize) -> EncodedVideo {
    let body = (0..size).map(|i| 1 + ((i * 7 + n as usize) % 250) as u8);
    let mut data = vec![];
    if keyframe {
        data.extend([0, 0, 0, 1, 0x67, 0x42, 0xc0, 0x1e, 0x8c, 0, 0, 0, 1, 0x68, 0xce, 0x3c, 0x80]);
    }
    data.extend([0, 0, 0, 1, if keyframe { 0x65 } else { 0x41 }]);
    data.extend(body);
    let frame = MediaTime::from_units(1, 25);
    EncodedVideo {
        at: MediaTime::from_units(n, 25),
        duration: frame,
        keyframe,
        width: 64,
        height: 64,
        data: data.into(),
    }
}

fn voice(n: i64) -> EncodedAudio {
    let packet = MediaTime::from_millis(20);
    let data = vec![0xf8, n as u8, 3, 4, 5].into();
    EncodedAudio { at: MediaTime::from_millis(20 * n), duration: packet, data }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn media_and_messages_flow_both_ways_with_right_times() {
    let net = Net::new(config()).unwrap();
    let mut live = connect(&net).await;
    println!("offer to connected: {:?}", live.took);

    // Speech in: 50 packets, one of them padding only.
    for n in 0..50 {
        live.client.speak(n, if n == 20 { b"" } else { &[0xf8, 1, 2, 3] }).await;
        tokio::time::sleep(Duration::from_millis(4)).await;
    }
    let mut speech = vec![];
    while speech.len() < 50 {
        match until(&mut live.events, |e| matches!(e, LinkEvent::Speech(_))).await {
            Some(LinkEvent::Speech(packet)) => speech.push(packet),
            _ => panic!("only {} of 50 speech packets came", speech.len()),
        }
    }
    assert!(speech.iter().enumerate().all(|(n, p)| usize::from(p.sequence) == n && p.timestamp as usize == 960 * n));
    assert!(speech[20].payload.is_empty() && speech[21].payload.len() == 4, "SSRC {SPEECH_SSRC:x}");

    // Video and voice out: two seconds in real time; the keyframe is large.
    let start = Instant::now() + Duration::from_millis(20);
    for n in 0..100 {
        let wall = start + Duration::from_millis(20 * n as u64);
        tokio::time::sleep_until(wall.into()).await;
        live.out.audio(voice(n), wall);
        if n % 2 == 0 {
            live.out.video(unit(n / 2, n == 0, if n == 0 { 20_000 } else { 2_000 }), wall);
        }
    }
    tokio::time::sleep(Duration::from_millis(400)).await;
    let units = live.client.units();
    assert_eq!(units.len(), 50, "every access unit arrives");
    for (n, got) in units.iter().enumerate() {
        let sent = unit(n as i64, n == 0, if n == 0 { 20_000 } else { 2_000 });
        assert!(got.complete && got.data == sent.data[..], "unit {n} differs");
        assert_eq!(got.timestamp.wrapping_sub(units[0].timestamp), 3600 * n as u32);
    }
    {
        let received = live.client.received.lock().unwrap();
        assert_eq!(received.audio.len(), 100);
        let first = received.audio[0].1.header.timestamp;
        assert!(
            received
                .audio
                .iter()
                .enumerate()
                .all(|(n, (_, p))| p.header.timestamp == first.wrapping_add(960 * n as u32))
        );
        // Sender reports: RTP zero of both streams is media zero, so the two NTP times of one media time must agree.
        let report = |ssrc: u32| received.reports.iter().rev().find(|(_, r)| r.ssrc == ssrc).map(|(_, r)| r.clone());
        let (audio, video) = (&received.audio[0].1.header, &received.video[0].1.header);
        let (a, v) = (report(audio.ssrc).expect("audio report"), report(video.ssrc).expect("video report"));
        let zero = |ntp: u64, rtp: u32, first: u32, rate: f64| {
            ntp as f64 / 2f64.powi(32) - f64::from(rtp.wrapping_sub(first) as i32) / rate
        };
        let offset =
            zero(a.ntp_time, a.rtp_time, audio.timestamp, 48e3) - zero(v.ntp_time, v.rtp_time, video.timestamp, 90e3);
        assert!(offset.abs() < 0.001, "voice and lips are {offset} s apart by the sender reports");
        assert!(a.packet_count > 0 && v.packet_count > 0);
    }

    // A keyframe request, repeated: one event.
    for _ in 0..5 {
        live.client.picture_loss().await;
    }
    until(&mut live.events, |e| matches!(e, LinkEvent::KeyframeRequested)).await.expect("a keyframe request");
    assert_eq!(live.out.stats().keyframe_requests, 1);

    // Messages.
    live.client.message(r#"{"type":"interrupt"}"#).await;
    let message = until(&mut live.events, |e| matches!(e, LinkEvent::Message(_))).await;
    assert!(matches!(message, Some(LinkEvent::Message(text)) if text.contains("interrupt")));
    live.out.message(r#"{"type":"state","state":"listening"}"#.into());
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(live.client.received.lock().unwrap().messages, [r#"{"type":"state","state":"listening"}"#]);

    // The other side leaves: we notice within seconds.
    let left = Instant::now();
    live.client.close().await;
    until(&mut live.events, |e| matches!(e, LinkEvent::Closed(_))).await.expect("closed is seen");
    println!("client closed to event: {:?}", left.elapsed());
    assert!(left.elapsed() < Duration::from_secs(4));
    live.peer.close().await;
    live.peer.close().await;
    assert!(matches!(live.peer.trickle("a=ice-ufrag:abcd\r\n").await, Err(NetError::Closed)));
}

/// Sends a second of pictures and voice to `client` and checks what comes.
async fn plays(client: &Client, out: &dyn LinkOut) {
    let start = Instant::now() + Duration::from_millis(20);
    for n in 0..50 {
        let wall = start + Duration::from_millis(20 * n as u64);
        tokio::time::sleep_until(wall.into()).await;
        out.audio(voice(n), wall);
        if n % 2 == 0 {
            out.video(unit(n / 2, n == 0, if n == 0 { 20_000 } else { 2_000 }), wall);
        }
    }
    tokio::time::sleep(Duration::from_millis(400)).await;
    let units = client.units();
    assert_eq!(units.len(), 25, "every access unit arrives");
    for (n, got) in units.iter().enumerate() {
        let sent = unit(n as i64, n == 0, if n == 0 { 20_000 } else { 2_000 });
        assert!(got.complete && got.data == sent.data[..], "unit {n} differs");
    }
    assert_eq!(client.received.lock().unwrap().audio.len(), 50);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_publisher_is_heard_a_player_sees_and_a_server_is_offered() {
    let net = Net::new(config()).unwrap();
    // WHIP: speech in, and the answer goes one way only.
    let mut client = Client::new().await;
    let offer = client.publisher().await;
    let ((peer, mut events, _out), answer) = net.answer_whip(&offer).await.expect("WHIP is answered");
    assert!(answer.contains("a=recvonly") && !answer.contains("a=sendrecv") && answer.contains("a=rtcp-mux-only"));
    client.accept(&answer).await;
    assert!(client.connected(Duration::from_secs(5)).await, "the publisher connects");
    for n in 0..20 {
        client.speak(n, &[0xf8, 1, 2, 3]).await;
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    until(&mut events, |e| matches!(e, LinkEvent::Speech(_))).await.expect("speech comes");
    client.close().await;
    until(&mut events, |e| matches!(e, LinkEvent::Closed(_))).await.expect("its leaving is seen");
    peer.close().await;

    // WHEP, also when the player would send.
    for sendrecv in [false, true] {
        let mut client = Client::new().await;
        let mut offer = client.player().await;
        if sendrecv {
            offer = offer.replace("a=recvonly", "a=sendrecv");
        }
        let ((peer, mut events, out), answer) = net.answer_whep(&offer).await.expect("WHEP is answered");
        assert_eq!(answer.matches("a=sendonly").count(), 2, "{answer}");
        let streams: std::collections::HashSet<_> =
            answer.lines().filter_map(|l| l.strip_prefix("a=msid:")?.split(' ').next()).collect();
        assert_eq!(streams.len(), 1, "{answer}");
        client.accept(&answer).await;
        assert!(client.connected(Duration::from_secs(5)).await, "the player connects");
        until(&mut events, |e| matches!(e, LinkEvent::Connected)).await.expect("connected");
        plays(&client, &*out).await;
        client.picture_loss().await;
        until(&mut events, |e| matches!(e, LinkEvent::KeyframeRequested)).await.expect("a keyframe request");
        peer.close().await;
    }

    // WHIP towards another server, which is played by a client that answers.
    let offering = net.offer(&[]).await.expect("an offer");
    let offer = offering.sdp().to_string();
    assert_eq!(offer.matches("a=sendonly").count(), 2, "{offer}");
    assert!(offer.contains("a=setup:actpass") && offer.contains("a=group:BUNDLE") && offer.contains("a=candidate"));
    let mut server = Client::new().await;
    let answer = server.answer(&offer).await;
    let (peer, mut events, out) = offering.accept(&answer).await.expect("accepted");
    assert!(server.connected(Duration::from_secs(5)).await, "the server connects");
    until(&mut events, |e| matches!(e, LinkEvent::Connected)).await.expect("connected");
    plays(&server, &*out).await;
    peer.close().await;
    let refused = net.offer(&[]).await.unwrap().accept("v=0\r\nnonsense").await.map(|_| ());
    assert!(matches!(refused, Err(NetError::Malformed(_))), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn data_channels_carry_bytes_and_an_offering_peer_restarts_ice() {
    let (ours, theirs) = (Net::new(config()).unwrap(), Net::new(config()).unwrap());
    let (back, _unheard) = mpsc::channel(16);
    let (data, mut heard) = mpsc::channel(16);
    let specs =
        [DataChannelSpec { label: "_reliable", reliable: true }, DataChannelSpec { label: "_lossy", reliable: false }];
    let (offering, channels) = ours.offer_with_data(&[], &specs, back).await.unwrap();
    // Said before there is anybody to hear it.
    assert!(channels[0].send(vec![0, 1, 2]) && channels[1].send(vec![3]));
    let ((peer, _their_events, _their_out), answer) = theirs.answer_data(offering.sdp(), &[], data).await.unwrap();
    let (caller, mut events, out) = offering.accept(&answer).await.unwrap();
    until(&mut events, |e| matches!(e, LinkEvent::Connected)).await.expect("connected");
    async fn next(heard: &mut mpsc::Receiver<Data>) -> Data {
        loop {
            let data =
                tokio::time::timeout(Duration::from_secs(5), heard.recv()).await.expect("in time").expect("more");
            if !data.opened {
                return data;
            }
        }
    }
    let mut first = vec![next(&mut heard).await, next(&mut heard).await];
    first.sort_by_key(|d| d.bytes.len());
    assert_eq!((&*first[0].label, &first[0].bytes[..]), ("_lossy", &[3][..]));
    assert_eq!((&*first[1].label, &first[1].bytes[..]), ("_reliable", &[0, 1, 2][..]));

    let offer = caller.reoffer().await.unwrap();
    let credentials = |sdp: &str| sdp.lines().find(|l| l.starts_with("a=ice-ufrag:")).map(str::to_string);
    assert_ne!(credentials(&offer), credentials(&answer));
    let again = peer.renegotiate(&offer).await.unwrap();
    assert_ne!(credentials(&again), credentials(&answer), "new credentials on both sides");
    caller.accept(&again).await.unwrap();
    for n in 0..20u8 {
        assert!(channels[0].send(vec![n; 15_000]));
        let message = next(&mut heard).await;
        assert_eq!((message.bytes.len(), message.bytes[0]), (15_000, n));
    }
    for bad in ["", "v=0", "v=0\r\nm=application 9 x y\r\n"] {
        assert!(peer.renegotiate(bad).await.is_err() && caller.accept(bad).await.is_err(), "{bad}");
    }
    drop(out);
    peer.close().await;
    caller.close().await;
    assert!(caller.reoffer().await.is_err(), "a closed peer offers nothing");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_ice_restart_keeps_the_connection_and_a_bad_one_too() {
    let net = Net::new(config()).unwrap();
    let mut live = connect(&net).await;
    let tag = live.peer.etag();
    assert!(tag.starts_with('"') && tag.ends_with('"'));
    let old = live.client.pc.local_description().await.unwrap().sdp;
    let credentials = |sdp: &str| {
        let find = |k: &str| sdp.lines().find_map(|l| l.trim().strip_prefix(k)).unwrap().to_string();
        (find("a=ice-ufrag:"), find("a=ice-pwd:"))
    };
    let (ufrag, pwd) = credentials(&old);
    assert!(live.peer.trickle("a=mid:0\r\na=candidate:1 1 udp 1 abc.local 9 typ host\r\n").await.is_ok());
    assert!(matches!(
        live.peer.restart(&format!("a=ice-ufrag:{ufrag}\r\na=ice-pwd:{pwd}\r\n")).await,
        Err(NetError::NotARestart)
    ));
    assert!(matches!(live.peer.restart("a=ice-ufrag:x\r\n").await, Err(NetError::Malformed(_))));
    assert_eq!(live.peer.etag(), tag);

    // The client restarts; only the fragment of its new offer travels.
    let offer = live
        .client
        .pc
        .create_offer(Some(rtc::peer_connection::configuration::RTCOfferOptions { ice_restart: true }))
        .await
        .unwrap();
    live.client.pc.set_local_description(offer).await.unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    let new = live.client.pc.local_description().await.unwrap().sdp;
    let (ufrag, pwd) = credentials(&new);
    assert_ne!(credentials(&old).0, ufrag);
    let mut fragment =
        format!("a=ice-ufrag:{ufrag}\r\na=ice-pwd:{pwd}\r\nm=audio 9 UDP/TLS/RTP/SAVPF 0\r\na=mid:0\r\n");
    for line in new.lines().filter(|l| l.starts_with("a=candidate:")) {
        fragment += &format!("{}\r\n", line.trim());
    }
    let ours = live.peer.restart(&fragment).await.expect("restarted");
    assert_ne!(live.peer.etag(), tag);
    assert!(ours.contains("a=ice-ufrag:") && ours.contains("a=candidate:") && ours.contains("a=mid:"), "{ours}");
    // What a client does with it: its current remote description with our new credentials and candidates.
    let remote = live.client.pc.remote_description().await.unwrap().sdp;
    let (ufrag, pwd) = credentials(&ours);
    assert_ne!(credentials(&remote).0, ufrag);
    let answer: String = remote
        .lines()
        .map(|l| match l.trim() {
            l if l.starts_with("a=ice-ufrag:") => format!("a=ice-ufrag:{ufrag}\r\n"),
            l if l.starts_with("a=ice-pwd:") => format!("a=ice-pwd:{pwd}\r\n"),
            l => format!("{l}\r\n"),
        })
        .collect();
    live.client.accept(&answer).await;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    while live.events.try_recv().is_ok() {}
    for n in 0..20 {
        live.client.speak(n, &[0xf8, 1, 2, 3]).await;
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    until(&mut live.events, |e| matches!(e, LinkEvent::Speech(_))).await.expect("speech still comes after the restart");
    live.peer.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fifty_peers_come_and_go_without_leaving_a_socket() {
    // Four ports for fifty peers: each must come back, as a lease and as a socket.
    let ports = (20_000..60_000u16)
        .step_by(97)
        .map(|first| first..first + 4)
        .find(|r| r.clone().all(|p| std::net::UdpSocket::bind(("127.0.0.1", p)).is_ok()))
        .expect("four free ports in a row");
    let net = Net::new(Config { port_min: ports.start, port_max: ports.end - 1, ..config() }).unwrap();
    for n in 0..50 {
        let Live { client, peer, mut events, out, .. } = connect(&net).await;
        // Four ways to end it; whoever does, everything goes.
        match n % 4 {
            0 => peer.close().await,
            1 => drop(events),
            2 => {
                drop(out);
                until(&mut events, |e| matches!(e, LinkEvent::Closed(_))).await.expect("the session is told");
            }
            _ => drop(peer),
        }
        client.close().await;
    }
    let mut held = vec![];
    for _ in 0..50 {
        held = ports.clone().filter(|p| std::net::UdpSocket::bind(("127.0.0.1", *p)).is_err()).collect();
        if held.is_empty() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(held.is_empty(), "ports still held: {held:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ice_lite_a_port_range_and_tcp_work() {
    let free = std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let one = Net::new(Config { ice_lite: true, ice_tcp: true, port_min: free, port_max: free, ..config() }).unwrap();
    let live = connect(&one).await;
    println!("ICE-lite, offer to connected: {:?}", live.took);
    let answer = live.client.pc.remote_description().await.unwrap().sdp;
    assert!(answer.contains("a=ice-lite"));
    assert!(answer.contains(&format!("127.0.0.1 {free} typ host")), "{answer}");
    assert!(answer.contains("tcptype passive"), "{answer}");
    // The range has one port, and it is taken.
    let second = one.answer_live(&Client::new().await.offer().await).await.map(|_| ());
    assert!(matches!(second, Err(NetError::NoPort(_))), "{second:?}");
    live.peer.close().await;
    connect(&one).await.peer.close().await;

    // With its UDP candidates taken away, a client that speaks TCP still gets through.
    let mut client = Client::new_with(true).await;
    let ((peer, mut events, _out), answer) = one.answer_live(&client.offer().await).await.unwrap();
    let (tcp, rest): (Vec<&str>, Vec<&str>) = answer.lines().partition(|l| l.starts_with("a=candidate"));
    client.accept(&(rest.join("\r\n") + "\r\n")).await;
    for candidate in tcp.into_iter().filter(|l| l.contains("tcptype passive")) {
        client.candidate(candidate).await;
    }
    assert!(client.connected(Duration::from_secs(5)).await, "over TCP");
    until(&mut events, |e| matches!(e, LinkEvent::Connected)).await.expect("connected over TCP");
    peer.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rubbish_at_the_socket_disturbs_nobody() {
    let net = Net::new(config()).unwrap();
    let mut live = connect(&net).await;
    let answer = live.client.pc.remote_description().await.unwrap().sdp;
    let port: u16 = answer
        .lines()
        .find_map(|l| l.strip_prefix("a=candidate:")?.split(' ').nth(5)?.parse().ok())
        .expect("a candidate with a port");
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut seed = 88_172_645_463_325_252u64;
    for n in 0..3000usize {
        let mut next = || {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed as u8
        };
        let mut data: Vec<u8> = (0..n % 200).map(|_| next()).collect();
        // First bytes of STUN, DTLS, TURN channels, RTP and RTCP in turn.
        if let Some(first) = data.first_mut() {
            *first = [0, 1, 20, 22, 23, 64, 128, 129, 144, 191, *first][n % 11];
        }
        if n % 3 == 0 && data.len() > 8 {
            data[4..8].copy_from_slice(&0x2112_a442u32.to_be_bytes());
        }
        if n % 5 == 0 && data.len() > 1 {
            data[1] = [200, 201, 205, 206][n % 4];
        }
        socket.send_to(&data, ("127.0.0.1", port)).unwrap();
        if n % 100 == 0 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
    for n in 0..20 {
        live.client.speak(n, &[0xf8, 1, 2, 3]).await;
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    until(&mut live.events, |e| matches!(e, LinkEvent::Speech(_))).await.expect("speech still comes");
    live.peer.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn offers_that_cannot_work_are_refused_by_their_own_names() {
    let net = Net::new(config()).unwrap();
    let offer = Client::new().await.offer().await;
    let answer = |text: String| {
        let net = net.clone();
        async move { net.answer_live(&text).await.map(|_| ()) }
    };
    assert!(answer(offer.clone()).await.is_ok());
    assert!(matches!(answer(String::new()).await, Err(NetError::Malformed(_))));
    assert!(matches!(answer("hello".into()).await, Err(NetError::Malformed(_))));
    assert!(matches!(answer(offer.clone() + &"a=x\r\n".repeat(20_000)).await, Err(NetError::TooLarge(_))));
    assert!(matches!(answer(offer.replace("H264", "H265")).await, Err(NetError::NoH264)));
    assert!(matches!(
        answer(offer.replace("packetization-mode=1", "packetization-mode=0")).await,
        Err(NetError::NoH264)
    ));
    assert!(matches!(answer(offer.replace("opus", "speex")).await, Err(NetError::NoOpus)));
    assert!(matches!(answer(offer.replace("m=video", "m=text")).await, Err(NetError::NoVideo)));
    assert!(matches!(answer(offer.replace("a=sendrecv", "a=recvonly")).await, Err(NetError::NoMicrophone)));
    assert!(matches!(answer(offer.replace("a=fingerprint", "a=nothing")).await, Err(NetError::Malformed(_))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mutated_offers_never_panic_or_hang() {
    let net = Net::new(config()).unwrap();
    let offer = Client::new().await.offer().await;
    let lines: Vec<&str> = offer.lines().collect();
    // A small generator of our own: the same cases every time.
    let mut seed = 0x2545_f491_4f6c_dd1du64;
    let mut next = move |n: usize| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        (seed % n as u64) as usize
    };
    let (mut accepted, mut refused) = (0, 0);
    for _ in 0..200 {
        let mut changed: Vec<String> = lines.iter().map(|l| l.to_string()).collect();
        for _ in 0..1 + next(3) {
            let at = next(changed.len());
            match next(6) {
                0 => drop(changed.remove(at)),
                1 => changed[at] = changed[at].chars().rev().collect(),
                2 => changed[at].truncate(next(12)),
                3 => changed[at] += ["\0", " 99999999999999999999", "é🙂", ":::::", "=a=b;c"][next(5)],
                4 => {
                    changed[at] =
                        changed[at].replace(|c: char| c.is_ascii_digit(), ["-1", "4294967296", "", "x"][next(4)])
                }
                _ => changed.insert(at, lines[next(lines.len())].to_string()),
            }
        }
        let text = changed.join("\r\n") + "\r\n";
        let answered = tokio::time::timeout(Duration::from_secs(10), net.answer_live(&text)).await.expect("no hang");
        match answered {
            Ok((peer, ..)) => {
                accepted += 1;
                peer.0.close().await;
            }
            Err(error) => {
                refused += 1;
                assert!(error.is_client(), "a mutated offer was called our fault: {error}\n{text}");
            }
        }
    }
    println!("{accepted} accepted, {refused} refused");
    assert!(accepted > 0 && refused > 0);
    // And the room still works.
    connect(&net).await.peer.close().await;
}
