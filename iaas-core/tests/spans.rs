//! Spans lead from a request to its operation, and from there to the provider.

#![allow(clippy::unwrap_used, reason = "a test may")]

mod common;

use std::io;
use std::sync::Arc;
use std::sync::Mutex;

use common::LONG;
use common::Rig;
use common::tenant;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::fmt::format::FmtSpan;

/// Keeps what is written.
#[derive(Clone, Debug, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Self;
    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_an_operation_and_a_resource_are_named_from_the_call_to_the_provider() {
    let lines = Lines::default();
    tracing_subscriber::fmt()
        .with_ansi(false)
        .with_max_level(tracing::Level::DEBUG)
        .with_span_events(FmtSpan::CLOSE)
        .with_writer(lines.clone())
        .init();
    let rig = Rig::new();
    let cloud = rig.open().await.unwrap();
    let root = cloud.session_as("root");
    let tenant = tenant(&root, &rig, "acme").await.unwrap();
    let launch = root.instances().launch(tenant.project, tenant.instance("web", vec![])).await.unwrap();
    let web = tokio::time::timeout(LONG, launch.wait()).await.unwrap().unwrap();
    let refused = root.instances().launch(tenant.project, tenant.instance("web", vec![])).await.unwrap_err();
    cloud.close().await.unwrap();

    let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
    let has = |parts: &[&str]| {
        let found = text.lines().any(|line| parts.iter().all(|part| line.contains(part)));
        assert!(found, "no line has {parts:?} in:\n{text}");
    };
    let (op, web) = (launch.id().to_string(), web.to_string());
    has(&[
        "request{id=",
        "action=\"instance.create\"",
        "who=\"root\"",
        &format!("operation={op}"),
        "accepted",
    ]);
    has(&["action=\"instance.create\"", "refused", &refused.to_string()]);
    has(&[
        &format!("look{{object=instance {web} operation={op}}}"),
        &format!("fake.ensure{{op={op} object=vm {web}}}"),
    ]);
}
