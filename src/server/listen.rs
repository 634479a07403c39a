//! The accept loop: bounded connections, a deadline on every request head, an orderly end.
//!
//! | edge | capacity | when full |
//! | --- | --- | --- |
//! | connections | `server.max_connections`, `server.connections_per_address` | closed at once, counted |

use super::Service;
use crate::telemetry::metrics;
use axum::Router;
use hyper::{
    Request,
    body::Incoming,
    server::conn::http1,
    service::{Service as _, service_fn},
};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use std::{net::SocketAddr, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
    sync::Semaphore,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// Answers requests until `stop`, then lets answers in flight finish for at most `grace`.
pub(super) async fn serve(
    listener: TcpListener,
    app: Router,
    service: &Service,
    stop: CancellationToken,
    grace: Duration,
) {
    let config = &service.config;
    let places = Arc::new(Semaphore::new(config.max_connections));
    let tasks = TaskTracker::new();
    let header_timeout = config.header_timeout();
    loop {
        let (stream, peer) = tokio::select! {
            biased;
            () = stop.cancelled() => break,
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(e) => {
                    // Most often "too many open files": those open now must end before there is room.
                    tracing::warn!("a connection could not be accepted: {e}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
        };
        let Ok(place) = places.clone().try_acquire_owned() else {
            metrics().connections_refused.inc();
            continue;
        };
        // Proxies bring many people, and this machine's own programs are not counted.
        let ip = peer.ip().to_canonical();
        let node = || service.rooms.cluster.as_ref().is_some_and(|cluster| cluster.is_node(ip));
        let counted = !ip.is_loopback() && !config.proxies.contains(&ip) && !node();
        let ticket = counted.then(|| service.limits.connection(ip, config.connections_per_address));
        if let Some(None) = ticket {
            metrics().connections_refused.inc();
            continue;
        }
        let (app, stop) = (app.clone(), stop.clone());
        let acceptor = service.tls.as_ref().ok().and_then(|tls| Some(tls.as_ref()?.acceptor.clone()));
        tasks.spawn(async move {
            metrics().connections.inc();
            let _ = stream.set_nodelay(true);
            match acceptor {
                None => connection(stream, peer, app, header_timeout, stop).await,
                // As long as for a head: a client that says nothing holds a place no longer.
                Some(acceptor) => match tokio::time::timeout(header_timeout, acceptor.accept(stream)).await {
                    Ok(Ok(stream)) => connection(stream, peer, app, header_timeout, stop).await,
                    Ok(Err(e)) => tracing::debug!("a TLS connection did not come about: {e}"),
                    Err(_) => tracing::debug!("a TLS connection took too long to come about"),
                },
            }
            metrics().connections.dec();
            drop((place, ticket));
        });
    }
    drop(listener);
    tasks.close();
    let _ = tokio::time::timeout(grace, tasks.wait()).await;
}

async fn connection(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    peer: SocketAddr,
    app: Router,
    header_timeout: Duration,
    stop: CancellationToken,
) {
    let mut builder = http1::Builder::new();
    // The timer runs from when a head is awaited, so it also ends idle connections.
    builder.timer(TokioTimer::new()).header_read_timeout(header_timeout).max_buf_size(64 * 1024);
    let app = TowerToHyperService::new(app);
    let service = service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(peer);
        app.call(request)
    });
    let mut serving = std::pin::pin!(builder.serve_connection(TokioIo::new(stream), service).with_upgrades());
    let done = tokio::select! {
        done = serving.as_mut() => done,
        () = stop.cancelled() => {
            serving.as_mut().graceful_shutdown();
            serving.await
        }
    };
    if let Err(e) = done {
        tracing::debug!("an HTTP connection ended: {e}");
    }
}
