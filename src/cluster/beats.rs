//! The connection to the bus: kept up, listened on, and beaten over.

use super::{
    BEAT, DEAD, NodeId,
    config::Config,
    node::{ClusterError, Local, Node, lock},
    outage::advice,
    table::Standing,
};
use async_nats::{Client, ConnectOptions, Event};
use futures::StreamExt;
use std::{
    collections::HashSet,
    net::SocketAddr,
    sync::{Arc, Weak},
    time::{Duration, Instant},
};
use tokio_util::sync::CancellationToken;

/// Messages of one subscription that wait to be read.
const WAITING: usize = 1024;
/// A bus that does not answer for twice this long is gone.
const PING: Duration = Duration::from_secs(2);
/// How long answers in flight may take at the end.
const GOODBYE: Duration = Duration::from_secs(2);
const CONNECT: Duration = Duration::from_secs(2);
const RECONNECT: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(1));

impl Node {
    /// Connects, tells the others of `local` once a second and answers them, until `stop`; then says goodbye. A bus that
    /// cannot be reached is tried again for ever. `http`: where this node listens.
    ///
    /// # Errors
    /// Settings that NATS cannot be reached with at all.
    pub async fn run(
        self: Arc<Self>,
        local: Arc<dyn Local>,
        http: SocketAddr,
        stop: CancellationToken,
    ) -> Result<(), ClusterError> {
        let _ = self.address.set(address(&self.config, http));
        *lock(&self.local) = Some(local);
        let client = connect(&self.config, Arc::downgrade(&self)).await?;
        let _ = self.client.set(client.clone());
        let refused = |e: async_nats::SubscribeError| ClusterError::Options(e.to_string());
        let mut beats = client.subscribe(self.subjects.beats.clone()).await.map_err(refused)?;
        let mut own = client.subscribe(self.subjects.of(self.id())).await.map_err(refused)?;
        let mut ticks = tokio::time::interval(BEAT);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut alive = HashSet::new();
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                _ = ticks.tick() => {
                    self.mourn(&mut alive);
                    self.say(&client).await;
                }
                () = self.changed.notified() => self.say(&client).await,
                Some(message) = beats.next() => self.hear_beat(message),
                Some(message) = own.next() => self.hear(message),
            }
        }
        // Whoever ended the last session here still waits for the answer.
        let _ = tokio::time::timeout(GOODBYE, self.answered()).await;
        self.beat(&client, true).await;
        *lock(&self.local) = None;
        let _ = tokio::time::timeout(BEAT, client.flush()).await;
        Ok(())
    }

    async fn say(&self, client: &Client) {
        // What is said to a bus that is not there would be said later, when it is not true any more.
        if client.connection_state() == async_nats::connection::State::Connected {
            self.beat(client, false).await;
        }
    }

    /// Logs who has died.
    fn mourn(&self, alive: &mut HashSet<NodeId>) {
        let now = Instant::now();
        let mut table = lock(&self.table);
        // A bus that does not bring us our own beats tells nothing of others either, connected or not.
        if table.standing(self.id(), now) == Standing::Dead {
            table.listens(None);
            self.gone("silent", now);
        }
        alive.retain(|id| {
            let dead = table.standing(*id, now) == Standing::Dead;
            if dead && table.get(*id).is_some_and(|p| now.saturating_duration_since(p.heard) > DEAD) {
                tracing::warn!(node = %id, "a node is dead: it missed three beats; its sessions are gone");
            }
            !dead
        });
        alive.extend(table.alive(now).map(|place| place.beat.node));
        table.forget(now);
    }

    fn hear_of_bus(&self, event: &Event) {
        let now = Instant::now();
        match event {
            Event::Connected => {
                lock(&self.table).listens(Some(now));
                self.back(now);
                self.changed();
            }
            Event::Disconnected | Event::Closed => {
                lock(&self.table).listens(None);
                self.gone("gone", now);
            }
            Event::ClientError(error) => lock(&self.outage).failed(error.to_string()),
            other if lock(&self.outage).complains(now) => tracing::warn!("the bus complains: {other}"),
            _ => {}
        }
    }

    fn gone(&self, how: &str, now: Instant) {
        if lock(&self.outage).gone(now) {
            tracing::warn!("the bus is {how}: sessions go on, others cannot be asked until it is back");
        }
    }

    pub(super) fn back(&self, now: Instant) {
        if let Some(away) = lock(&self.outage).back(now) {
            tracing::info!(node = %self.id(), "the bus is there, after {:.1} s", away.as_secs_f64());
        }
    }

    /// Before each try to connect: what became of the one before.
    fn tried(&self, servers: &[async_nats::Server]) {
        let wrong = servers.iter().filter_map(|s| Some(format!("{s}: {}", s.last_error.as_ref()?)));
        let wrong = wrong.collect::<Vec<_>>().join("; ");
        if let Some(why) = lock(&self.outage).retry(wrong, Instant::now()) {
            tracing::warn!("the bus cannot be reached, and is tried again: {why}{}", advice(&why));
        }
    }
}

async fn connect(config: &Config, node: Weak<Node>) -> Result<Client, ClusterError> {
    let trying = node.clone();
    let mut options = ConnectOptions::new()
        .name("loquent")
        .retry_on_initial_connect()
        .ping_interval(PING)
        .connection_timeout(CONNECT)
        .subscription_capacity(WAITING)
        .reconnect_delay_callback(|attempt| (RECONNECT.0 * attempt.min(100) as u32).min(RECONNECT.1))
        .event_callback(move |event| {
            if let Some(node) = node.upgrade() {
                node.hear_of_bus(&event);
            }
            std::future::ready(())
        })
        // Which server is tried is left to the library; only here it tells what was wrong with the last try.
        .reconnect_to_server_callback(move |servers, _| {
            if let Some(node) = trying.upgrade() {
                node.tried(&servers);
            }
            std::future::ready(None)
        });
    if !config.user.is_empty() {
        options = options.user_and_password(config.user.clone(), config.password.clone());
    }
    if !config.token.is_empty() {
        options = options.token(config.token.clone());
    }
    if !config.credentials_file.is_empty() {
        let file = config.credentials_file.clone();
        options = options.credentials_file(&file).await.map_err(|source| ClusterError::Credentials { file, source })?;
    }
    if !config.tls_ca.is_empty() {
        options = options.add_root_certificates(config.tls_ca.clone().into()).require_tls(true);
    }
    if !config.tls_cert.is_empty() {
        options = options
            .add_client_certificate(config.tls_cert.clone().into(), config.tls_key.clone().into())
            .require_tls(true);
    }
    let servers: Result<Vec<async_nats::ServerAddr>, _> = config.nats.iter().map(|s| s.parse()).collect();
    let servers = servers.map_err(|e| ClusterError::Options(e.to_string()))?;
    options.connect(servers).await.map_err(|e| ClusterError::Options(e.to_string()))
}

/// Where the others reach this node's HTTP: what is configured, or where it listens, if that is one address.
fn address(config: &Config, http: SocketAddr) -> String {
    match config.address.trim_end_matches('/') {
        "" if http.ip().is_unspecified() => {
            tracing::warn!(
                "other nodes do not know where this one is: WebSockets and recordings of its sessions cannot be had \
                 through them. Set cluster.address"
            );
            String::new()
        }
        "" => format!("http://{http}"),
        said => said.into(),
    }
}
