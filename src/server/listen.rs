//! The accept loop: bounded connections, a deadline on every request head, an orderly end.
//!
//! | edge | capacity | when full |
//! | --- | --- | --- |
//! | connections | `server.max_connections` | closed at once, counted |

use super::Config;
use crate::telemetry::metrics;
use axum::Router;
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use std::{sync::Arc, time::Duration};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// Answers requests until `stop`, then lets answers in flight finish for at most `grace`.
pub(super) async fn serve(
    listener: TcpListener,
    app: Router,
    config: &Config,
    stop: CancellationToken,
    grace: Duration,
) {
    let places = Arc::new(Semaphore::new(config.max_connections));
    let tasks = TaskTracker::new();
    let header_timeout = config.header_timeout();
    loop {
        let stream = tokio::select! {
            biased;
            () = stop.cancelled() => break,
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
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
        let (app, stop) = (app.clone(), stop.clone());
        tasks.spawn(async move {
            metrics().connections.inc();
            connection(stream, app, header_timeout, stop).await;
            metrics().connections.dec();
            drop(place);
        });
    }
    drop(listener);
    tasks.close();
    let _ = tokio::time::timeout(grace, tasks.wait()).await;
}

async fn connection(stream: TcpStream, app: Router, header_timeout: Duration, stop: CancellationToken) {
    let _ = stream.set_nodelay(true);
    let mut builder = http1::Builder::new();
    // The timer runs from when a head is awaited, so it also ends idle connections.
    builder.timer(TokioTimer::new()).header_read_timeout(header_timeout).max_buf_size(64 * 1024);
    let mut serving =
        std::pin::pin!(builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(app)).with_upgrades());
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
