//! `loquent serve`: the live service.

use super::{
    config_cmd::Source,
    engines::{self, Wanted},
    large, loading,
};
use crate::{
    avatar,
    cluster::Node,
    codec::BadgePlace,
    config::{Change, Config},
    engine::{self, Engine, Health, Kind},
    net::Net,
    server::{self, EngineFailure, Presenter, Server, Service},
    session::{Reason, Registry},
    telemetry,
    voice::Voice,
};
use anyhow::Context as _;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

#[derive(clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    source: Source,
    /// Where HTTP listens [default: 127.0.0.1:8080]; port 0 takes a free one.
    #[arg(long, value_name = "IP:PORT")]
    listen: Option<String>,
    /// A file with API keys, as `loquent key new` writes it; needed for an address that other machines can reach.
    #[arg(long, value_name = "FILE")]
    keys_file: Option<String>,
    /// What makes the picture: pocket (the built-in model), s2v (the large model) or card (a test card) [default: pocket].
    #[arg(long, value_name = "NAME")]
    engine: Option<String>,
    /// Conversations at once [default: 1].
    #[arg(long, value_name = "N")]
    sessions: Option<usize>,
    /// Be a node of a cluster: its NATS servers. With --sessions 0, one that hands everything on to others.
    #[arg(long, value_name = "URL,…")]
    cluster: Option<String>,
    /// Serve the page from this folder instead of from the program.
    #[arg(long, value_name = "DIR")]
    web_dir: Option<String>,
    #[command(flatten)]
    large: large::Flags,
    /// End by itself after so many seconds (for tests).
    #[arg(long, value_name = "SECONDS", hide = true)]
    stop_after: Option<u64>,
}

impl Args {
    /// This command's own flags as changes to the configuration.
    fn changes(&self) -> Vec<Change> {
        let flag = |name: &str, key: &str, value: Option<String>| {
            let origin = format!("--{name}");
            value.map(|value| Change { origin, key: key.into(), value })
        };
        let all = [
            flag("listen", "server.listen", self.listen.clone()),
            flag("keys-file", "server.keys_file", self.keys_file.clone()),
            flag("engine", "engine.generator", self.engine.clone()),
            flag("sessions", "engine.sessions", self.sessions.map(|n| n.to_string())),
            flag("cluster", "cluster.nats", self.cluster.clone()),
            flag("web-dir", "server.web_dir", self.web_dir.clone()),
        ];
        all.into_iter().flatten().collect()
    }
}

/// A line on standard output; a reader that has gone (`loquent serve | head`) must not end the service.
macro_rules! say {
    ($($text:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stdout(), $($text)*);
    }};
}

/// Serves until told to stop, or until the engine has failed for good (which is an error).
pub(super) fn run(args: Args) -> anyhow::Result<()> {
    let mut loaded = args.source.load(&args.changes())?;
    loaded.config.s2v = args.large.over(choice(loaded.config.engine.generator), loaded.config.s2v)?;
    loaded.config.validate()?;
    telemetry::init(&loaded.config.log)?;
    tracing::info!("settings: {}", loaded.from);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("loquent-io")
        .build()
        .context("the program could not start its threads")?;
    let done = runtime.block_on(serve(loaded.config, args.stop_after.map(Duration::from_secs)));
    // Blocking work in flight (a picture being read) must not hold the exit.
    runtime.shutdown_timeout(Duration::from_secs(1));
    done
}

async fn serve(config: Config, stop_after: Option<Duration>) -> anyhow::Result<()> {
    // Whatever can be refused cheaply is refused before the model is loaded.
    if !config.log.traces.is_empty() {
        telemetry::export(&config.log.traces)?;
    }
    let net = Net::new(config.net.clone())?;
    let presenters = presenters(&config);
    let voice = Voice::new(config.voice.clone(), std::env::var(&config.voice.key_variable).ok())?;
    if config.session.badge == BadgePlace::Off {
        tracing::warn!(
            "session.badge is off: nobody can see that the picture is computer-made; many countries ask whoever shows it \
             to say so"
        );
    }
    let engine = {
        let config = config.clone();
        tokio::task::spawn_blocking(move || build(&config)).await.context("the engine's start panicked")??
    };
    let sessions = Registry::of(choice(config.engine.generator).name());
    let service = Service::new(
        config.server.clone(),
        server::Rooms {
            engine: engine.clone(),
            engine_name: choice(config.engine.generator).name(),
            net,
            sessions: sessions.clone(),
            session_config: config.session.clone(),
            livekit: config.livekit.clone(),
            steps: config.engine.steps,
            presenters,
            voice,
            cluster: config.cluster.on().then(|| Node::new(config.cluster.clone())),
        },
    );
    let server = Server::bind(service.clone()).await?;
    announce(&config, &engine, server.local_addr()?);

    let stop_http = CancellationToken::new();
    let http = tokio::spawn(server.run(stop_http.clone()));
    tokio::spawn(keep_files(service.clone()));
    notify("READY=1");
    let failure = wait_for_the_end(&engine, config.server.engine_failure, stop_after).await?;

    service.drain();
    notify("STOPPING=1");
    if failure.is_none() && !sessions.is_empty() {
        let (wait, grace) = (config.server.drain_wait_s, config.server.drain_timeout_s);
        let (n, seconds) = (sessions.len(), wait + grace);
        say!("Stopping: {}, {seconds} s to end; Ctrl-C again ends them now.", conversations(n));
        let drained = async {
            if wait > 0 && sessions.emptied(Duration::from_secs(wait)).await {
                return;
            }
            sessions.drain_all(&Reason::ServiceClosing);
            sessions.emptied(Duration::from_secs(grace)).await;
        };
        tokio::select! {
            () = drained => {}
            _ = stop_signal() => {}
        }
    }
    let reason = match &failure {
        Some(why) => Reason::EngineFailed(why.clone()),
        None => Reason::ServiceClosing,
    };
    sessions.close_all(&reason);
    sessions.emptied(Duration::from_secs(2)).await;
    stop_http.cancel();
    http.await.context("the HTTP server panicked")?;
    match failure {
        Some(why) => anyhow::bail!("the engine has failed for good: {why}"),
        None => Ok(()),
    }
}

fn choice(kind: Kind) -> engines::Choice {
    match kind {
        Kind::Pocket => engines::Choice::Pocket,
        Kind::Card => engines::Choice::Card,
        Kind::S2v => engines::Choice::S2v,
    }
}

/// Real time that all conversations together may take of the larger pictures: the rest is for encoding and the network.
const SHARE: f64 = 0.6;

/// Loads and warms up the generator on its own thread; takes seconds, with the large model minutes. Where nobody chose a
/// size for the pocket engine's pictures and the machine is too slow for the usual one, it is loaded again with smaller ones.
fn build(config: &Config) -> Result<Engine, engine::EngineError> {
    let engine = built(config, config.engine.size)?;
    let takes = engine.stats().real_time_factor * config.engine.sessions as f64;
    if config.engine.generator != Kind::Pocket || config.engine.size.is_some() || takes <= SHARE {
        return Ok(engine);
    }
    tracing::warn!(
        "pictures of {0}×{0} would take {1:.0} % of the time they show for {2} at once, so they are {3}×{3} here; \
         engine.size = {0} insists on them",
        engines::SIZE,
        100.0 * takes,
        config.engine.sessions,
        engines::SMALL
    );
    drop(engine);
    built(config, Some(engines::SMALL))
}

fn built(config: &Config, size: Option<usize>) -> Result<Engine, engine::EngineError> {
    // A node that hands everything on draws nothing: it needs no model.
    let choice = match config.engine.sessions {
        0 => engines::Choice::Card,
        _ => choice(config.engine.generator),
    };
    let (threads, large) = (config.engine.threads, config.s2v.clone());
    let wanted = Wanted { choice, threads, size, weights: None, large, watcher: loading::logged(), silent: false };
    Engine::start(choice.name(), &config.engine, move || {
        engines::load(&wanted, &[]).map_err(|e| avatar::AvatarError::Weights(format!("{e:#}")))
    })
}

/// Who can be shown without an upload: the built-in faces, and before them, on the test card, the card's own picture.
fn presenters(config: &Config) -> Vec<Presenter> {
    let card = (config.engine.generator == Kind::Card).then(|| Presenter {
        id: "card".into(),
        name: "Test card".into(),
        description: "A time code and a level meter that follow your voice.".into(),
        png: bytes::Bytes::from_static(include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/web/card.png"))),
    });
    let faces = avatar::presenters().iter().map(|p| Presenter {
        id: p.id.into(),
        name: p.name.into(),
        description: p.description.into(),
        png: bytes::Bytes::from_static(p.png),
    });
    card.into_iter().chain(faces).collect()
}

/// Says, on standard output, what listens where and which address to open.
fn announce(config: &Config, engine: &Engine, http: std::net::SocketAddr) {
    let g = engine.geometry();
    let stats = engine.stats();
    say!("Loquent {}", env!("CARGO_PKG_VERSION"));
    say!(
        "  engine  {}, {}x{} at {} frames a second, {} at once, real-time factor {:.2}{}",
        choice(config.engine.generator).name(),
        g.width,
        g.height,
        g.fps,
        conversations(stats.slots),
        stats.real_time_factor,
        if stats.slots > 1 { " each" } else { "" }
    );
    say!("  http    {http}: page, API, /healthz, /readyz, /metrics");
    say!("  media   {}", media(&config.net));
    let host = match http {
        a if a.ip().is_unspecified() => format!("localhost:{}", a.port()),
        a => a.to_string(),
    };
    let scheme = if config.server.tls_cert.is_empty() { "http" } else { "https" };
    say!("Open {scheme}://{host}/ and press Start. Ctrl-C ends the service.");
}

fn conversations(n: usize) -> String {
    if n == 1 { "1 conversation".into() } else { format!("{n} conversations") }
}

fn media(net: &crate::net::Config) -> String {
    let addresses: Vec<String> = net.bind.iter().map(|a| a.to_string()).collect();
    let ports = match (net.port_min, net.port_max) {
        (0, _) => "ports chosen by the system".into(),
        (low, high) => format!("ports {low}-{high}"),
    };
    let tcp = if net.ice_tcp { " and TCP" } else { "" };
    format!("UDP{tcp} on {}, {ports}, one for each conversation", addresses.join(" and "))
}

/// Returns when the service should end: `None` when somebody asked for it, else why the engine failed.
async fn wait_for_the_end(
    engine: &Engine,
    on_failure: EngineFailure,
    stop_after: Option<Duration>,
) -> anyhow::Result<Option<String>> {
    let mut health = engine.health();
    let failed = async {
        let failed = health.wait_for(|h| matches!(h, Health::Failed(_))).await;
        let why = match failed.as_deref() {
            Ok(Health::Failed(why)) => why.clone(),
            _ => "its thread is gone".into(),
        };
        tracing::error!("the engine has failed for good: {why}");
        if on_failure == EngineFailure::Stay {
            std::future::pending::<()>().await;
        }
        why
    };
    let time_up = async {
        match stop_after {
            Some(after) => tokio::time::sleep(after).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        why = failed => Ok(Some(why)),
        signal = stop_signal() => signal.map(|()| None),
        () = time_up => Ok(None),
    }
}

/// Tells systemd how far we are (sd_notify(3)), where it started us as Type=notify.
fn notify(state: &str) {
    use std::os::{linux::net::SocketAddrExt as _, unix::net};
    let Some(name) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let name = name.to_string_lossy();
    let address = match name.strip_prefix('@') {
        Some(name) => net::SocketAddr::from_abstract_name(name),
        None => net::SocketAddr::from_pathname(name.as_ref()),
    };
    let sent = address.and_then(|to| net::UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &to));
    if let Err(e) = sent {
        tracing::warn!("the service manager could not be told {state}: {e}");
    }
}

/// Reads keys and certificate again at SIGHUP, and when they changed; never returns.
async fn keep_files(service: std::sync::Arc<Service>) {
    use tokio::signal::unix::{SignalKind, signal};
    let mut hangup = match signal(SignalKind::hangup()) {
        Ok(hangup) => hangup,
        Err(e) => {
            return tracing::error!("SIGHUP cannot be listened for, so keys and certificates are not read again: {e}");
        }
    };
    let mut looks = tokio::time::interval(Duration::from_secs(2));
    loop {
        tokio::select! {
            _ = hangup.recv() => service.reload(true),
            _ = looks.tick() => service.reload(false),
        }
    }
}

/// Ctrl-C, or the termination signal of service managers.
async fn stop_signal() -> anyhow::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate()).context("the termination signal cannot be listened for")?;
    tokio::select! {
        done = tokio::signal::ctrl_c() => done.context("Ctrl-C cannot be listened for"),
        _ = terminate.recv() => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        avatar::{AvatarError, Generator, OpenOptions, Stream},
        media::{Geometry, Portrait},
    };

    /// Opens faces until it is told to break.
    struct Fragile {
        inner: Box<dyn Generator>,
        opened: usize,
    }

    impl Generator for Fragile {
        fn geometry(&self) -> Geometry {
            self.inner.geometry()
        }
        fn open(&mut self, portrait: &Portrait, options: &OpenOptions) -> avatar::Result<Box<dyn Stream>> {
            self.opened += 1;
            // The first face is the warm-up's.
            if self.opened > 1 {
                return Err(AvatarError::Device { block: 0, stage: "open", source: "it broke".into() });
            }
            self.inner.open(portrait, options)
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_failed_engine_ends_the_service_with_its_reason() {
        let config = engine::Config { rebuilds: 0, ..engine::Config::default() };
        let engine = tokio::task::spawn_blocking(move || {
            Engine::start("fragile", &config, || Ok(Box::new(Fragile { inner: avatar::test_card(), opened: 0 }) as _))
        });
        let engine = engine.await.unwrap().unwrap();
        let slot = engine.admit().unwrap();
        let portrait = Portrait { width: 8, height: 8, rgb: vec![0; 192].into() };
        assert!(slot.open(portrait, OpenOptions::default()).await.is_err());
        let long = Some(Duration::from_secs(20));
        let why = wait_for_the_end(&engine, EngineFailure::Exit, long).await.unwrap();
        assert!(why.as_deref().is_some_and(|w| w.contains("it broke")), "{why:?}");
        // Told to stay, it goes on until somebody ends it.
        let short = Some(Duration::from_millis(100));
        assert_eq!(wait_for_the_end(&engine, EngineFailure::Stay, short).await.unwrap(), None);
    }
}
