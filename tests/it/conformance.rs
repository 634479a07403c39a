//! WHIP (RFC 9725) and WHEP (draft-ietf-wish-whep-03), requirement by requirement: each is tried against a running
//! service, printed as a row of a table, and must hold. `cargo test --release --test it conformance -- --nocapture`
//! shows the table.

use crate::{
    peer::Client,
    server::{FRAGMENT, House, SDP, house, house_with},
};
use loquent::{
    avatar::{self, Generator, OpenOptions, Stream},
    media::{Geometry, Portrait},
    net::IceServer,
    session::{Reason, SessionId},
};
use rtc::peer_connection::transport::RTCDtlsTransportState;
use std::time::Duration;

struct Table(Vec<(&'static str, &'static str, bool, String)>);

impl Table {
    fn row(&mut self, clause: &'static str, requirement: &'static str, held: bool, got: impl std::fmt::Debug) {
        self.0.push((clause, requirement, held, format!("{got:?}").chars().take(60).collect()));
    }

    fn end(self) {
        println!("| {:>3} | {:<12} | {:<100} | result |", "", "clause", "requirement");
        for (n, (clause, requirement, held, got)) in self.0.iter().enumerate() {
            let result = if *held { "ok".into() } else { format!("FAILED: {got}") };
            println!("| {:>3} | {clause:<12} | {requirement:<100} | {result} |", n + 1);
        }
        let failed = self.0.iter().filter(|r| !r.2).count();
        assert_eq!(failed, 0, "{failed} of {} rows failed; the table is above", self.0.len());
    }
}

const TURN: &str = "turn:turn.example.net:3478?transport=udp";

/// A service with room for a few sessions' worth of trying, and one session.
struct Tried {
    house: House,
    id: String,
    token: String,
}

impl Tried {
    async fn new(house: House) -> Tried {
        let made = house.post("/v1/sessions", "application/json", b"{}").await;
        assert_eq!(made.status, 201, "{}", made.text());
        let told = made.json();
        let text = |name: &str| told[name].as_str().unwrap_or_else(|| panic!("no {name}: {told}")).to_string();
        Tried { id: text("id"), token: text("token"), house }
    }

    fn path(&self, kind: &str) -> String {
        format!("/v1/sessions/{}/{kind}", self.id)
    }

    async fn ask(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> crate::server::Answer {
        let bearer = format!("Bearer {}", self.token);
        let headers = [&[("Authorization", bearer.as_str())], headers].concat();
        self.house.ask(method, path, &headers, body.as_bytes()).await
    }

    async fn offer(&self, kind: &str, offer: &str) -> crate::server::Answer {
        self.ask("POST", &self.path(kind), &[("Content-Type", SDP)], offer).await
    }
}

/// One media section: kind, direction, codec lines, mid.
fn section(kind: &str, mid: usize, direction: &str, stream: &str, codec: &str) -> String {
    let print = vec!["AB"; 32].join(":");
    let types: Vec<&str> = codec.lines().filter_map(|l| l.strip_prefix("a=rtpmap:")?.split(' ').next()).collect();
    let (types, ssrc) = (types.join(" "), 1000 + mid);
    format!(
        "m={kind} 9 UDP/TLS/RTP/SAVPF {types}\r\nc=IN IP4 0.0.0.0\r\na=ice-ufrag:Qm9v\r\n\
         a=ice-pwd:MTIzNDU2Nzg5MDEyMzQ1Njc4OTAxMg\r\na=ice-options:trickle\r\na=fingerprint:sha-256 {print}\r\n\
         a=setup:actpass\r\na=mid:{mid}\r\na={direction}\r\na=msid:{stream} {kind}{mid}\r\na=rtcp-mux\r\na=rtcp-mux-only\r\n\
         {codec}a=ssrc:{ssrc} cname:c\r\n"
    )
}

const OPUS: &str = "a=rtpmap:111 opus/48000/2\r\na=fmtp:111 minptime=10;useinbandfec=1\r\n";
const H264: &str = "a=rtpmap:108 H264/90000\r\na=rtcp-fb:108 nack\r\na=rtcp-fb:108 nack pli\r\na=rtcp-fb:108 transport-cc\r\n\
     a=fmtp:108 level-asymmetry-allowed=1;packetization-mode=1;profile-level-id=42e01f\r\n\
     a=rtpmap:109 rtx/90000\r\na=fmtp:109 apt=108\r\n";

fn offer(sections: &[String]) -> String {
    let mids: String = (0..sections.len()).map(|mid| format!(" {mid}")).collect();
    let head = format!("v=0\r\no=- 4611731400430051336 2 IN IP4 127.0.0.1\r\ns=-\r\nt=0 0\r\na=group:BUNDLE{mids}\r\n");
    head + &sections.concat()
}

/// Voice alone, or voice and face, in one direction.
pub(crate) fn both(direction: &str) -> String {
    offer(&[section("audio", 0, direction, "s", OPUS), section("video", 1, direction, "s", H264)])
}

fn directions(answer: &str) -> Vec<&str> {
    let known = ["a=sendrecv", "a=sendonly", "a=recvonly", "a=inactive"];
    answer.lines().map(str::trim).filter(|l| known.contains(l)).collect()
}

fn refused(status: u16) -> bool {
    status == 400 || status == 422
}

const TRICKLE: &str = "a=ice-ufrag:Qm9v\r\na=ice-pwd:MTIzNDU2Nzg5MDEyMzQ1Njc4OTAxMg\r\nm=audio 9 UDP/TLS/RTP/SAVPF 111\r\n\
     a=mid:0\r\na=candidate:1 1 udp 2113937151 127.0.0.1 9 typ host\r\n";

/// What WHIP and WHEP ask for alike.
async fn common(table: &mut Table, tried: &Tried, kind: &'static str) {
    let [http, setup, patch, ice, restart, bundle, auth, stun, redirect] = match kind {
        "whip" => [
            "9725 §4.1",
            "9725 §4.2",
            "9725 §4.3",
            "9725 §4.3.1",
            "9725 §4.3.3",
            "9725 §4.4",
            "9725 §4.7",
            "9725 §4.6",
            "9725 §4.5",
        ],
        _ => [
            "WHEP §4.1",
            "WHEP §4.2",
            "WHEP §4.4",
            "WHEP §4.4.1",
            "WHEP §4.4.2",
            "WHEP §4.5",
            "WHEP §4.8",
            "WHEP §4.7",
            "WHEP §4.6",
        ],
    };
    let (path, whip) = (tried.path(kind), kind == "whip");
    let (out, back) = if whip { ("sendonly", "a=recvonly") } else { ("recvonly", "a=sendonly") };

    let got = tried.ask("GET", &path, &[], "").await;
    table.row(
        http,
        "GET on the endpoint: 2xx without content",
        got.status / 100 == 2 && got.body.is_empty(),
        got.status,
    );
    let got = tried.ask("OPTIONS", &path, &[], "").await;
    table.row(
        setup,
        "OPTIONS: 200 with Accept-Post: application/sdp",
        (got.status, got.header("accept-post")) == (200, SDP),
        got.status,
    );
    table.row(stun, "OPTIONS may carry the ICE servers", got.header("link").contains(TURN), got.header("link"));
    let asks = [
        ("Origin", "https://app.example"),
        ("Access-Control-Request-Method", "POST"),
        ("Access-Control-Request-Headers", "authorization,content-type"),
    ];
    let got = tried.house.ask("OPTIONS", &path, &asks, b"").await;
    table.row(
        setup,
        "CORS preflight: 200, without a token, with Accept-Post",
        (got.status, got.header("accept-post")) == (200, SDP),
        got.status,
    );
    let allows = |name: &str, what: &[&str]| what.iter().all(|w| got.header(name).contains(w));
    let cors = allows("access-control-allow-methods", &["POST", "PATCH", "DELETE"])
        && allows("access-control-allow-headers", &["Content-Type", "If-Match", "Authorization"]);
    table.row(
        setup,
        "CORS preflight: methods and headers that are needed are allowed",
        cors,
        got.header("access-control-allow-headers"),
    );
    table.row(stun, "CORS preflight: no ICE servers", got.header("link").is_empty(), got.header("link"));

    let got = tried.ask("POST", &path, &[("Content-Type", "application/json")], &both(out)).await;
    table.row(setup, "POST of another content type: 4xx", got.status == 415, got.status);
    let got = tried.ask("POST", &path, &[], &both(out)).await;
    table.row(setup, "POST without a content type: 4xx", got.status == 415, got.status);
    let got = tried.offer(kind, "this is no description").await;
    table.row(setup, "POST of malformed SDP: 4xx", got.status == 400, got.status);
    let got = tried.house.ask("POST", &path, &[("Content-Type", SDP)], both(out).as_bytes()).await;
    let challenge = got.header("www-authenticate").starts_with("Bearer");
    table.row(auth, "POST without the Bearer token: 401 with a challenge", got.status == 401 && challenge, got.status);
    let wrong = [("Content-Type", SDP), ("Authorization", "Bearer nonsense")];
    let got = tried.house.ask("POST", &path, &wrong, both(out).as_bytes()).await;
    table.row(auth, "POST with a wrong token: 401 or 403", [401, 403].contains(&got.status), got.status);

    let made = tried.ask("POST", &path, &[("Content-Type", SDP), ("Origin", "https://app.example")], &both(out)).await;
    let answer = made.text();
    table.row(
        setup,
        "POST with the token: 201 Created, application/sdp",
        (made.status, made.header("content-type")) == (201, SDP),
        &answer,
    );
    let exposed = made.header("access-control-expose-headers").to_string();
    let all = ["Location", "ETag", "Link", "Retry-After"].iter().all(|h| exposed.contains(h));
    table.row(
        setup,
        "CORS: the answer's headers can be read by pages",
        all && made.header("access-control-allow-origin") == "https://app.example",
        exposed,
    );
    let one = made.header("location").to_string();
    let secret = one.rsplit('/').next().unwrap_or("").len();
    let again = tried.offer(kind, &both(out)).await;
    table.row(
        setup,
        "Location: the connection's own URL",
        one.starts_with(&format!("{path}/")) && one != again.header("location"),
        &one,
    );
    table.row("9725 §5", "that URL cannot be guessed (128 random bits)", secret == 32, secret);
    let etag = made.header("etag").to_string();
    table.row(patch, "ETag in the 201, strong", etag.len() > 8 && etag.starts_with('"') && etag.ends_with('"'), &etag);
    table.row(patch, "ETag names one ICE session", etag != again.header("etag"), again.header("etag"));
    table.row(
        stun,
        "Link rel=\"ice-server\" in the 201, with username, credential, credential-type",
        made.header("link").contains(TURN)
            && ["rel=\"ice-server\"", "username=\"u\"", "credential=\"c\"", "credential-type=\"password\""]
                .iter()
                .all(|p| made.header("link").contains(p)),
        made.header("link"),
    );
    table.row(stun, "one Link for each server", made.header("link").matches("rel=").count() == 2, made.header("link"));
    table.row(
        "9725 §4.9",
        "no extension is advertised that is not there",
        !made.header("link").contains("urn:ietf"),
        made.header("link"),
    );
    table.row(setup, "the answer goes the one way only", directions(&answer) == [back, back], directions(&answer));
    let sendrecv = tried.offer(kind, &both("sendrecv")).await.text();
    table.row(setup, "…also to an offer of sendrecv", directions(&sendrecv) == [back, back], directions(&sendrecv));
    for (bad, clause) in [("inactive", setup), (if whip { "recvonly" } else { "sendonly" }, setup)] {
        let got = tried.offer(kind, &both(bad)).await;
        table.row(clause, "an offer the wrong way, or of nothing, is refused", refused(got.status), got.status);
    }
    table.row(bundle, "max-bundle: all sections in one BUNDLE group", answer.contains("a=group:BUNDLE 0 1"), &answer);
    let muxed = |what: &str| answer.lines().filter(|l| l.trim() == what).count() == 2;
    table.row(bundle, "rtcp-mux in every section", muxed("a=rtcp-mux"), &answer);
    table.row(bundle, "rtcp-mux-only in every section", muxed("a=rtcp-mux-only"), &answer);
    table.row(
        bundle,
        "no section of the answer is rejected",
        !answer.contains("m=audio 0") && !answer.contains("m=video 0"),
        &answer,
    );
    let got = tried.offer(kind, &both(out).replace("a=rtcp-mux\r\n", "")).await;
    table.row(bundle, "an offer without rtcp-mux is refused whole", refused(got.status), got.status);
    let got = tried.offer(kind, &both(out).replace("a=group:BUNDLE 0 1", "a=group:BUNDLE 0")).await;
    table.row(bundle, "an offer that is not bundled is refused whole", refused(got.status), got.status);
    let two = offer(&[section("audio", 0, out, "s", OPUS), section("audio", 1, out, "s", OPUS)]);
    let got = tried.offer(kind, &two).await;
    table.row(bundle, "two tracks of one kind: 422 or 400", refused(got.status), got.status);
    let two = offer(&[section("audio", 0, out, "a", OPUS), section("video", 1, out, "b", H264)]);
    let got = tried.offer(kind, &two).await;
    table.row(bundle, "two MediaStreams: 422 or 400", refused(got.status), got.status);
    let half =
        offer(&[section("audio", 0, out, "s", OPUS), section("video", 1, out, "s", "a=rtpmap:108 H261/90000\r\n")]);
    let got = tried.offer(kind, &half).await;
    table.row(
        bundle,
        "no partly successful answer: an unusable section refuses the whole offer",
        refused(got.status),
        got.status,
    );
    let got = tried.offer(kind, &both(out).replace("setup:actpass", "setup:active")).await;
    table.row(
        bundle,
        "a client that is DTLS client only is answered a=setup:passive",
        got.text().contains("a=setup:passive"),
        got.status,
    );
    table.row(bundle, "full ICE by default", !answer.contains("a=ice-lite"), &answer);
    table.row(
        ice,
        "the answer has all candidates",
        answer.contains("a=candidate:") && answer.contains("a=end-of-candidates"),
        &answer,
    );

    // PATCH.
    let with = |tag: &str, body: &str| {
        let (tag, body, one) = (tag.to_string(), body.to_string(), one.clone());
        async move { tried.ask("PATCH", &one, &[("Content-Type", FRAGMENT), ("If-Match", &tag)], &body).await }
    };
    let got = tried.ask("GET", &one, &[], "").await;
    table.row(
        http,
        "GET on the connection: 2xx without content",
        got.status / 100 == 2 && got.body.is_empty(),
        got.status,
    );
    let got = tried.ask("PATCH", &one, &[("Content-Type", "application/json"), ("If-Match", &etag)], TRICKLE).await;
    table.row(patch, "PATCH of another content type: 4xx", got.status == 415, got.status);
    let got = with(&etag, "\u{1}nonsense").await;
    table.row(patch, "PATCH of a malformed fragment: 4xx", got.status == 400, got.status);
    let got = tried.ask("PATCH", &one, &[("Content-Type", FRAGMENT)], TRICKLE).await;
    table.row(patch, "PATCH without If-Match: 428", got.status == 428, got.status);
    let got = with("\"stale\"", TRICKLE).await;
    table.row(patch, "PATCH with another ETag: 412", got.status == 412, got.status);
    let got = with(&etag, TRICKLE).await;
    table.row(ice, "trickle: 204 without a body", got.status == 204 && got.body.is_empty(), got.status);
    table.row(ice, "trickle: no ETag in the answer", got.header("etag").is_empty(), got.header("etag"));
    let odd = TRICKLE.replace(
        "udp 2113937151 127.0.0.1 9 typ host",
        "udp 1 9f2a.local 9 typ host\r\na=candidate:2 1 sctp 1 127.0.0.1 9 typ host",
    );
    let got = with(&etag, &odd).await;
    table.row(ice, "candidates that cannot be used are skipped without a word", got.status == 204, got.status);
    let got = with(&etag, &format!("{TRICKLE}a=end-of-candidates\r\n")).await;
    table.row(ice, "end-of-candidates is taken", got.status == 204, got.status);
    let got = with("*", TRICKLE).await;
    table.row(
        patch,
        "a request of an unsupported kind (a restart with the old credentials): 422",
        got.status == 422,
        got.status,
    );
    let got = with("*", "a=ice-ufrag:bmV3\r\na=mid:0\r\n").await;
    table.row(restart, "a restart that cannot be done: an error…", got.status / 100 == 4, got.status);
    let got = with(&etag, TRICKLE).await;
    table.row(restart, "…and the old ICE session stays", got.status == 204, got.status);
    let new = TRICKLE.replace("Qm9v", "bmV3").replace("MTIz", "NEUx");
    let got = with("*", &new).await;
    let text = got.text();
    table.row(
        restart,
        "restart with If-Match: *: 200 with a fragment",
        (got.status, got.header("content-type")) == (200, FRAGMENT),
        got.status,
    );
    let fresh = text.contains("a=ice-ufrag:")
        && text.contains("a=ice-pwd:")
        && text.contains("a=candidate:")
        && !answer.lines().any(|l| l.starts_with("a=ice-ufrag:") && text.contains(l.trim()));
    table.row(restart, "restart: new credentials and candidates in the answer", fresh, &text);
    let newer = got.header("etag").to_string();
    table.row(restart, "restart: a new ETag", !newer.is_empty() && newer != etag, &newer);
    let got = with(&etag, &new).await;
    table.row(restart, "the old ETag is over: 412", got.status == 412, got.status);
    let got = with(&newer, &new).await;
    table.row(restart, "the new one trickles: 204", got.status == 204, got.status);
    let got = with(&newer, &new.replace("bmV3", "bW9y")).await;
    table.row(
        restart,
        "new credentials are a restart also under the current ETag",
        got.status == 200 && got.header("etag") != newer,
        got.status,
    );

    let got = tried.ask("DELETE", &one, &[("If-Match", "\"any\"")], "").await;
    table.row(patch, "DELETE: 200, whatever ETag is sent", got.status == 200, got.status);
    let got = tried.ask("DELETE", &one, &[], "").await;
    table.row(setup, "what was deleted is gone: 404", got.status == 404, got.status);
    let got = with(&newer, &new).await;
    table.row(setup, "…for PATCH as well", got.status == 404, got.status);

    let short = format!("/{kind}/{}", tried.id);
    let got = tried.ask("POST", &short, &[("Content-Type", SDP)], &both(out)).await;
    table.row(
        redirect,
        "redirects are 307, never 301 or 302",
        (got.status, got.header("location")) == (307, &path),
        got.status,
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn whip_and_whep_are_as_their_documents_want_them() {
    let ice = IceServer {
        urls: vec![TURN.into(), "stun:stun.example.net".into()],
        username: "u".into(),
        credential: "c".into(),
    };
    let tried = Tried::new(house_on(ice).await).await;
    let mut table = Table(vec![]);
    for kind in ["whip", "whep"] {
        common(&mut table, &tried, kind).await;
    }
    // WHIP alone.
    let voice = offer(&[section("audio", 0, "sendonly", "s", OPUS)]);
    let got = tried.offer("whip", &voice).await;
    table.row("9725 §4.4.2", "one track is enough", got.status == 201, got.status);
    let vp8 = offer(&[
        section("audio", 0, "sendonly", "s", OPUS),
        section("video", 1, "sendonly", "s", "a=rtpmap:108 VP8/90000\r\n"),
    ]);
    let got = tried.offer("whip", &vp8).await;
    table.row(
        "9725 §4.4.3",
        "a picture of another codec is taken (and ignored), not rejected alone",
        got.status == 201 && !got.text().contains("m=video 0"),
        got.text(),
    );
    // WHEP alone.
    let head = tried.ask("HEAD", &tried.path("whep"), &[], "").await;
    let get = tried.ask("GET", &tried.path("whep"), &[], "").await;
    table.row(
        "WHEP §4.1.1",
        "HEAD: 200 with Content-Type: application/sdp",
        (head.status, head.header("content-type")) == (200, SDP),
        head.status,
    );
    table.row(
        "WHEP §4.1.1",
        "HEAD: the headers of GET",
        head.header("content-type") == get.header("content-type") && head.body.is_empty(),
        head.header("content-type"),
    );
    let got = tried.offer("whep", &both("recvonly")).await.text();
    let streams: std::collections::HashSet<_> =
        got.lines().filter_map(|l| l.strip_prefix("a=msid:")?.split(' ').next()).collect();
    table.row(
        "WHEP §4.5.2",
        "one MediaStream: the same msid in all sections",
        streams.len() == 1 && got.matches("a=msid:").count() == 2,
        streams,
    );
    let got = tried.offer("whep", &offer(&[section("audio", 0, "recvonly", "s", OPUS)])).await;
    table.row("WHEP §4.5.2", "a player may want the voice alone", got.status == 201, got.status);
    let got = tried.offer("whep", &offer(&[section("video", 0, "recvonly", "s", H264)])).await;
    table.row("WHEP §4.5.2", "…or the face alone", got.status == 201, got.status);
    let got = tried
        .house
        .ask(
            "POST",
            "/v1/sessions/0123456789abcdef0123456789abcdef/whep",
            &[("Content-Type", SDP)],
            both("recvonly").as_bytes(),
        )
        .await;
    table.row(
        "WHEP §4.2",
        "a session that is not there: 404, or 401 to strangers",
        [401, 404].contains(&got.status),
        got.status,
    );

    // Connections that stand.
    for kind in ["whip", "whep"] {
        let clause = if kind == "whip" { "9725 §4.2" } else { "WHEP §4.3" };
        let mut client = Client::new().await;
        let offer = if kind == "whip" { client.publisher().await } else { client.player().await };
        let made = tried.offer(kind, &offer).await;
        client.accept(&made.text()).await;
        let connected = client.connected(Duration::from_secs(5)).await;
        table.row(clause, "a client connects by the answer alone", connected, made.status);
        if kind == "whep" {
            let mut pictures = 0;
            for _ in 0..100 {
                pictures = client.units().len();
                if pictures > 5 {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            table.row(
                clause,
                "a player that joins gets pictures, a keyframe first",
                pictures > 5 && client.units()[0].data.windows(5).any(|w| w[..4] == [0, 0, 0, 1] && w[4] & 0x1f == 7),
                pictures,
            );
        }
        let gone = tried.ask("DELETE", made.header("location"), &[], "").await.status;
        let mut left = false;
        for _ in 0..60 {
            left = goodbye(&client).await;
            if left {
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        table.row(clause, "DELETE ends ICE and DTLS: the client sees it at once", gone == 200 && left, gone);
        client.close().await;
        // The other way round: the client goes without a word of HTTP.
        let mut client = Client::new().await;
        let offer = if kind == "whip" { client.publisher().await } else { client.player().await };
        let made = tried.offer(kind, &offer).await;
        client.accept(&made.text()).await;
        client.connected(Duration::from_secs(5)).await;
        if kind == "whip" {
            for n in 0..20 {
                client.speak(n, &[0xf8, 0xff, 0xfe]).await;
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
        client.close().await;
        let mut status = 0;
        for _ in 0..60 {
            status = tried.ask("GET", made.header("location"), &[], "").await.status;
            status = if status / 100 == 2 {
                tried.ask("PATCH", made.header("location"), &[("Content-Type", FRAGMENT)], TRICKLE).await.status
            } else {
                status
            };
            if status == 404 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        table.row(clause, "a DTLS goodbye ends the connection", status == 404, status);
    }

    // Too much.
    let made = tried.offer("whip", &both("sendonly")).await;
    let mut slow = 0;
    for _ in 0..120 {
        let got = tried
            .ask(
                "PATCH",
                made.header("location"),
                &[("Content-Type", FRAGMENT), ("If-Match", made.header("etag"))],
                TRICKLE,
            )
            .await;
        slow += usize::from(got.status == 429 && !got.header("retry-after").is_empty());
    }
    table.row("9725 §5", "PATCH is limited in rate: 429 with Retry-After", slow > 0, slow);
    let mut slow = 0;
    for _ in 0..200 {
        let got = tried.offer("whip", "v=1").await;
        slow += usize::from(got.status == 429 && !got.header("retry-after").is_empty());
    }
    table.row("9725 §5", "POST is limited in rate: 429 with Retry-After", slow > 0, slow);
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let handle = tried.house.service.session(&SessionId::from(tried.id.as_str())).expect("the session");
    handle.close(Reason::Stopped);
    tokio::time::sleep(Duration::from_millis(1000)).await;
    let got = tried.offer("whep", &both("recvonly")).await;
    table.row(
        "WHEP §4.2",
        "a session that is over: 404, 410, or 401",
        [401, 404, 410].contains(&got.status),
        got.status,
    );

    let small = Tried::new(house(|c| c.connections_max = 1).await).await;
    let first = small.offer("whep", &both("recvonly")).await.status;
    let full = small.offer("whep", &both("recvonly")).await;
    table.row(
        "9725 §4.5",
        "overload: 503 with Retry-After",
        (first, full.status) == (201, 503) && !full.header("retry-after").is_empty(),
        full.status,
    );

    let slow = Tried::new(house_with(|_| {}, || Ok(Box::new(Slow(avatar::test_card(), 0)))).await).await;
    let got = slow.offer("whep", &both("recvonly")).await;
    let told = got.status == 409 && !got.header("retry-after").is_empty();
    table.row("WHEP §4.2", "nothing is live yet: 409 with Retry-After", told, got.status);
    table.end();
}

async fn house_on(ice: IceServer) -> House {
    crate::server::house_of(
        |c| c.cors_origins = vec!["https://app.example".into()],
        |net| net.ice_servers = vec![ice],
        || Ok(avatar::test_card()),
    )
    .await
}

/// Whether the server has ended DTLS. The library has no event for it, only a state.
async fn goodbye(client: &Client) -> bool {
    let mut transports = vec![];
    for sender in client.pc.get_senders().await {
        transports.extend(sender.transport().await.ok().flatten());
    }
    for receiver in client.pc.get_receivers().await {
        transports.extend(receiver.transport().await.ok().flatten());
    }
    for transport in transports {
        if matches!(transport.state().await, Ok(RTCDtlsTransportState::Closed)) {
            return true;
        }
    }
    false
}

/// Takes its time to prepare a guest's face.
struct Slow(Box<dyn Generator>, usize);

impl Generator for Slow {
    fn geometry(&self) -> Geometry {
        self.0.geometry()
    }
    fn open(&mut self, portrait: &Portrait, options: &OpenOptions) -> avatar::Result<Box<dyn Stream>> {
        self.1 += 1;
        // The first face is the warm-up's.
        if self.1 > 1 {
            std::thread::sleep(Duration::from_secs(8));
        }
        self.0.open(portrait, options)
    }
}
