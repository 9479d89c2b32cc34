//! The SPI over a socket: what an error means, that sessions drain, and that versions N and N+1 get along.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeMap;
use std::io;
use std::os::unix::net::UnixStream as StdStream;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use ciborium::Value;
use iaas_core::Boot;
use iaas_core::Epoch;
use iaas_core::ErrorKind;
use iaas_core::Id;
use iaas_core::Outcome;
use iaas_core::Result;
use iaas_core::Rev;
use iaas_core::SystemClock;
use iaas_core::Term;
use iaas_core::spi::Call;
use iaas_core::spi::Cancel;
use iaas_core::spi::Ctx;
use iaas_core::spi::host::HostProviders;
use iaas_core::spi::hypervisor::Origin;
use iaas_core::spi::hypervisor::Run;
use iaas_core::spi::hypervisor::Vm;
use iaas_core::spi::hypervisor::VmSpec;
use iaas_core::spi::remote::Dialect;
use iaas_core::spi::remote::Remote;
use iaas_core::spi::remote::Served;
use iaas_core::spi::remote::Server;
use iaas_core::spi::remote::decode;
use iaas_core::spi::remote::encode;
use iaas_core::testing::fake;
use iaas_core::testing::fake::World;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixListener;
use tokio::net::UnixStream;
use uuid::Uuid;

fn world() -> (World, HostProviders) {
    let world = World::new(Arc::new(SystemClock::new()));
    let host = fake::Site::new(&world).host();
    (world, host)
}

fn cx(budget: Duration) -> Ctx {
    let call = Call {
        cloud: Id::from_uuid(Uuid::from_u128(1)),
        incarnation: Uuid::from_u128(2),
        epoch: Epoch(1),
        op: Id::from_uuid(Uuid::from_u128(3)),
        trace: None,
        budget,
    };
    Ctx { call, cancel: Cancel::new() }
}

const LONG: Duration = Duration::from_secs(60);

fn vm() -> VmSpec {
    VmSpec {
        term: Term(1),
        run: Run::On(Boot(1)),
        vcpus: 1,
        memory: 64 << 20,
        origin: Origin::Disk,
        devices: BTreeMap::new(),
        lease: None,
        metadata: None,
        passport: Bytes::new(),
    }
}

fn id() -> Id<Vm> {
    Id::from_uuid(Uuid::now_v7())
}

/// A client of `server` that speaks `dialect`; each dial is a new session.
async fn client(server: &Server, dialect: Dialect) -> Result<Remote> {
    let (server, runtime) = (server.clone(), tokio::runtime::Handle::current());
    let dial = move || -> io::Result<StdStream> {
        let (ours, theirs) = StdStream::pair()?;
        theirs.set_nonblocking(true)?;
        let server = server.clone();
        runtime.spawn(async move { server.session(UnixStream::from_std(theirs).unwrap()).await });
        Ok(ours)
    };
    Remote::over(dial, dialect).await
}

#[tokio::test]
async fn a_client_that_is_dropped_ends_its_session_and_lets_its_provider_go() {
    let (_, host) = world();
    let hypervisor = host.hypervisor.clone();
    let held = Arc::strong_count(&hypervisor) - 1;
    let server = Server::new(Served::new().host(host));
    let (ended, mut end) = tokio::sync::mpsc::unbounded_channel();
    let runtime = tokio::runtime::Handle::current();
    let dial = move || -> io::Result<StdStream> {
        let (ours, theirs) = StdStream::pair()?;
        theirs.set_nonblocking(true)?;
        let (server, ended) = (server.clone(), ended.clone());
        runtime.spawn(async move {
            let outcome = server.session(UnixStream::from_std(theirs).unwrap()).await;
            drop(server);
            ended.send(outcome).unwrap();
        });
        Ok(ours)
    };
    let remote = Remote::over(dial, Dialect::CURRENT).await.unwrap();
    let far = remote.host().unwrap().hypervisor;
    far.hello().await.unwrap();
    drop(remote);
    far.hello().await.unwrap();
    drop(far);
    let outcome =
        tokio::time::timeout(LONG, end.recv()).await.expect("the session goes on without its client");
    outcome.unwrap().unwrap();
    assert_eq!(Arc::strong_count(&hypervisor), held);
}

/// A client whose other side is `peer`, written by hand.
async fn by_hand<F: Future<Output = ()> + Send + 'static>(
    peer: impl Fn(Raw) -> F + Send + Sync + 'static,
) -> Result<Remote> {
    let runtime = tokio::runtime::Handle::current();
    let dial = move || -> io::Result<StdStream> {
        let (ours, theirs) = StdStream::pair()?;
        theirs.set_nonblocking(true)?;
        runtime.spawn(peer(Raw(UnixStream::from_std(theirs).unwrap())));
        Ok(ours)
    };
    Remote::over(dial, Dialect::CURRENT).await
}

/// A connection on which frames are written as bare CBOR.
struct Raw(UnixStream);

impl Raw {
    async fn send(&mut self, frame: &Value) {
        let body = encode(frame).unwrap();
        self.0.write_u32(u32::try_from(body.len()).unwrap()).await.unwrap();
        self.0.write_all(&body).await.unwrap();
    }

    async fn recv(&mut self) -> Option<Value> {
        let len = self.0.read_u32().await.ok()?;
        let mut body = vec![0; usize::try_from(len).unwrap()];
        self.0.read_exact(&mut body).await.ok()?;
        decode(&body).ok()
    }

    /// Welcomes a client to a host, in the words of a later version.
    async fn welcome(&mut self) {
        let hello = self.recv().await.unwrap();
        assert!(field(&hello, "Hello").is_some(), "{hello:?}");
        let id = || uuid(9);
        let card = map([
            (
                "host",
                map([("id", id()), ("fabric", id()), ("access", Value::Array(vec![])), ("later", 1.into())]),
            ),
            ("later", Value::Bool(true)),
        ]);
        let welcome = map([("protocol", 1.into()), ("card", card), ("later", "a field of N+1".into())]);
        self.send(&map([("Welcome", welcome)])).await;
    }

    async fn reply(&mut self, to: &Value, body: Vec<u8>) {
        let id = field(field(to, "Ask").unwrap(), "id").unwrap().clone();
        let reply = map([("id", id), ("body", map([("Ok", Value::Bytes(body))])), ("later", 7.into())]);
        self.send(&map([("Reply", reply)])).await;
    }
}

fn map<const N: usize>(fields: [(&str, Value); N]) -> Value {
    Value::Map(fields.into_iter().map(|(k, v)| (k.into(), v)).collect())
}

fn uuid(n: u128) -> Value {
    Value::serialized(&Uuid::from_u128(n)).unwrap()
}

fn field<'a>(map: &'a Value, name: &str) -> Option<&'a Value> {
    map.as_map()?.iter().find(|(k, _)| k.as_text() == Some(name)).map(|(_, v)| v)
}

/// The encoding of `value` with one field more.
fn with_more<T: serde::Serialize>(value: &T) -> Vec<u8> {
    let mut value = Value::serialized(value).unwrap();
    value.as_map_mut().unwrap().push(("later".into(), "a field of N+1".into()));
    encode(&value).unwrap()
}

// ---- versions -----------------------------------------------------------------------------------------------------

#[tokio::test]
async fn versions_n_and_n_plus_1_get_along_both_ways() {
    let dialects = [Dialect::CURRENT, Dialect::NEXT];
    for (theirs, server_is) in dialects.into_iter().zip(["N", "N+1"]) {
        for (ours, client_is) in dialects.into_iter().zip(["N", "N+1"]) {
            let (_, host) = world();
            let server = Server::speaking(Served::new().host(host), theirs);
            let remote = client(&server, ours).await.unwrap();
            let vms = remote.host().unwrap().hypervisor;
            let vm_id = id();
            vms.ensure(&cx(LONG), vm_id, Rev(1), &vm()).await.unwrap();
            assert_eq!(vms.inventory(&cx(LONG), None, 10).await.unwrap().len(), 1);
            // The verb and the field of N+1 work only where both sides know them.
            let both_new = server_is == "N+1" && client_is == "N+1";
            let echo = remote.echo("hello").await;
            match (both_new, echo) {
                (true, echo) => assert_eq!(echo.unwrap(), "hello"),
                (false, echo) => assert_eq!(echo.unwrap_err().kind(), ErrorKind::Unsupported),
            }
            assert_eq!(remote.protocol().await.unwrap(), if both_new { 2 } else { 1 });
        }
    }
}

#[tokio::test]
async fn unknown_fields_of_a_later_peer_are_ignored_in_what_is_observed() {
    let (_, host) = world();
    let seen = host.hypervisor.ensure(&cx(LONG), id(), Rev(1), &vm()).await.unwrap();
    let answer = with_more(&Some(seen.clone()));
    let remote = by_hand(move |mut raw| {
        let answer = answer.clone();
        async move {
            raw.welcome().await;
            let ask = raw.recv().await.unwrap();
            raw.reply(&ask, answer).await;
            // Keeps the connection until the client is done with it.
            raw.recv().await;
        }
    })
    .await
    .unwrap();
    let vms = remote.host().unwrap().hypervisor;
    assert_eq!(vms.observe(&cx(LONG), id()).await.unwrap(), Some(seen));
}

#[tokio::test]
async fn a_spec_that_is_not_understood_as_a_whole_is_unsupported_and_has_no_effect() {
    let (world, host) = world();
    let server = Server::new(Served::new().host(host));
    let (ours, theirs) = UnixStream::pair().unwrap();
    tokio::spawn(async move { server.session(theirs).await });
    let mut raw = Raw(ours);
    let range = Value::Array(vec![1.into(), 2.into()]);
    raw.send(&map([("Hello", map([("protocol", range), ("later", 1.into())]))])).await;
    let welcome = raw.recv().await.unwrap();
    assert_eq!(field(field(&welcome, "Welcome").unwrap(), "protocol"), Some(&1.into()));

    let ensure = |number: i32, spec: Vec<u8>| {
        let args = map([("id", uuid(5)), ("rev", 1.into()), ("spec", Value::Bytes(spec))]);
        let ask = map([
            ("id", number.into()),
            ("part", "Hypervisor".into()),
            ("kind", "vm".into()),
            ("verb", "ensure".into()),
            ("call", Value::serialized(&cx(LONG).call).unwrap()),
            ("args", Value::Bytes(encode(&args).unwrap())),
            ("later", "ignored".into()),
        ]);
        map([("Ask", ask)])
    };
    raw.send(&ensure(1, with_more(&vm()))).await;
    let reply = format!("{:?}", raw.recv().await.unwrap());
    assert!(reply.contains("Unsupported") && reply.contains("NotDone"), "{reply}");
    assert_eq!(world.effect_count(), 0);
    // The same connection goes on.
    raw.send(&ensure(2, encode(&vm()).unwrap())).await;
    let reply = raw.recv().await.unwrap();
    assert!(field(field(field(&reply, "Reply").unwrap(), "body").unwrap(), "Ok").is_some(), "{reply:?}");
    assert_eq!(world.effect_count(), 1);
}

#[tokio::test]
async fn one_unreadable_item_does_not_spoil_a_page() {
    let (_, host) = world();
    let vms = &host.hypervisor;
    for _ in 0..2 {
        vms.ensure(&cx(LONG), id(), Rev(1), &vm()).await.unwrap();
    }
    let found = vms.inventory(&cx(LONG), None, 10).await.unwrap();
    let mut strange = Value::serialized(&found[0]).unwrap();
    for (name, value) in strange.as_map_mut().unwrap() {
        if name.as_text() == Some("seen") {
            *value = map([("Ok", "a state of N+2".into())]);
        }
    }
    let page =
        Value::Array(vec![Value::Bytes(encode(&strange).unwrap()), Value::Bytes(encode(&found[1]).unwrap())]);
    let remote = by_hand(move |mut raw| {
        let page = encode(&page).unwrap();
        async move {
            raw.welcome().await;
            let ask = raw.recv().await.unwrap();
            raw.reply(&ask, page).await;
            raw.recv().await;
        }
    })
    .await
    .unwrap();
    let listed = remote.host().unwrap().hypervisor.inventory(&cx(LONG), None, 10).await.unwrap();
    assert_eq!(listed.len(), 2);
    assert_eq!((listed[0].id, listed[0].tag), (found[0].id, found[0].tag));
    assert!(listed[0].seen.is_err());
    assert_eq!(listed[1], found[1]);
}

// ---- errors -------------------------------------------------------------------------------------------------------

#[tokio::test]
async fn where_nobody_listens_nothing_was_done() {
    let folder = tempfile::tempdir().unwrap();
    let error = Remote::connect(folder.path().join("nobody")).await.unwrap_err();
    assert_eq!((error.kind(), error.outcome()), (ErrorKind::Unavailable, Outcome::NotDone));

    // A server that goes away: calls to it are not done, until it is back.
    let path = folder.path().join("host");
    let (_, host) = world();
    let server = Server::new(Served::new().host(host));
    let serving = |listener: UnixListener| {
        let server = server.clone();
        tokio::spawn(async move { server.serve(listener).await })
    };
    let first = serving(UnixListener::bind(&path).unwrap());
    let vms = Remote::connect(&path).await.unwrap().host().unwrap().hypervisor;
    vms.hello().await.unwrap();
    first.abort();
    let _ = first.await;
    std::fs::remove_file(&path).unwrap();
    let second_client = Remote::connect(&path).await.unwrap_err();
    assert_eq!(second_client.outcome(), Outcome::NotDone);
    let again = serving(UnixListener::bind(&path).unwrap());
    Remote::connect(&path).await.unwrap().host().unwrap().hypervisor.hello().await.unwrap();
    again.abort();
}

#[tokio::test]
async fn a_lost_connection_leaves_the_outcome_unknown_and_is_dialled_again() {
    let (_, host) = world();
    let hello = encode(&host.hypervisor.hello().await.unwrap()).unwrap();
    let dials = Arc::new(std::sync::atomic::AtomicU32::new(0));
    let count = dials.clone();
    let remote = by_hand(move |mut raw| {
        let (hello, first) = (hello.clone(), count.fetch_add(1, std::sync::atomic::Ordering::SeqCst) == 0);
        async move {
            raw.welcome().await;
            let ask = raw.recv().await.unwrap();
            if !first {
                raw.reply(&ask, hello).await;
                raw.recv().await;
            }
        }
    })
    .await
    .unwrap();
    let vms = remote.host().unwrap().hypervisor;
    let error = vms.ensure(&cx(LONG), id(), Rev(1), &vm()).await.unwrap_err();
    assert_eq!((error.kind(), error.outcome()), (ErrorKind::Unavailable, Outcome::Unknown));
    vms.hello().await.unwrap();
    assert_eq!(dials.load(std::sync::atomic::Ordering::SeqCst), 2);
}

#[tokio::test]
async fn a_full_send_queue_is_rate_limited_and_nothing_was_done() {
    let remote = by_hand(|mut raw| async move {
        raw.welcome().await;
        // Reads no further, and does not go away.
        std::future::pending::<()>().await;
    })
    .await
    .unwrap();
    let vms = remote.host().unwrap().hypervisor;
    let mut spec = vm();
    spec.passport = vec![7; 16 << 10].into();
    let mut calls = tokio::task::JoinSet::new();
    let limited = loop {
        let (vms, spec) = (vms.clone(), spec.clone());
        calls.spawn(async move { vms.ensure(&cx(LONG), id(), Rev(1), &spec).await });
        tokio::task::yield_now().await;
        if let Some(ended) = calls.try_join_next() {
            break ended.unwrap().unwrap_err();
        }
        assert!(calls.len() < 5000, "the queue has no end");
    };
    assert_eq!((limited.kind(), limited.outcome()), (ErrorKind::RateLimited, Outcome::NotDone));
    assert!(limited.retry_after().is_some());
}

#[tokio::test]
async fn giving_up_crosses_the_wire() {
    let (world, host) = world();
    world.set_delay(Duration::from_secs(3600));
    let remote = client(&Server::new(Served::new().host(host)), Dialect::CURRENT).await.unwrap();
    let vms = remote.host().unwrap().hypervisor;
    let cx = cx(LONG);
    let (spec, vm_id) = (vm(), id());
    let (ended, ()) = tokio::join!(vms.ensure(&cx, vm_id, Rev(1), &spec), async { cx.cancel.cancel() });
    let error = ended.unwrap_err();
    assert_eq!((error.kind(), error.outcome()), (ErrorKind::Cancelled, Outcome::NotDone));
    assert_eq!(world.effect_count(), 0);
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_does_not_come_in_time_leaves_the_outcome_unknown() {
    let remote = by_hand(|mut raw| async move {
        raw.welcome().await;
        while raw.recv().await.is_some() {}
    })
    .await
    .unwrap();
    let vms = remote.host().unwrap().hypervisor;
    let error = vms.ensure(&cx(Duration::from_secs(5)), id(), Rev(1), &vm()).await.unwrap_err();
    assert_eq!((error.kind(), error.outcome()), (ErrorKind::Timeout, Outcome::Unknown));
}

// ---- sessions -----------------------------------------------------------------------------------------------------

#[tokio::test]
async fn a_claim_by_a_new_session_waits_for_the_calls_of_the_old_one() {
    let (world, host) = world();
    world.set_delay(Duration::from_millis(100));
    let server = Server::new(Served::new().host(host));
    let old = client(&server, Dialect::CURRENT).await.unwrap().host().unwrap().hypervisor;
    let new = client(&server, Dialect::CURRENT).await.unwrap().host().unwrap().hypervisor;
    let (vm_id, first) = (id(), cx(LONG));
    {
        let spec = vm();
        let mut call = old.ensure(&first, vm_id, Rev(1), &spec);
        // Frames of one session are taken in order: when the hello is answered, the ensure is inside.
        tokio::select! {
            biased;
            ended = &mut call => panic!("a call that takes 100 ms ended at once: {ended:?}"),
            hello = old.hello() => hello.map(|_| ()).unwrap(),
        }
        // Its caller goes away.
    }
    new.claim(&cx(LONG)).await.unwrap();
    // The same leader, with the same epoch: only the session can tell the calls apart.
    assert_eq!(world.effect_count(), 1, "the claim was answered before the older call had ended");

    // What the old session sends now is refused; it connects again.
    world.set_delay(Duration::ZERO);
    let error = old.ensure(&cx(LONG), id(), Rev(1), &vm()).await.unwrap_err();
    assert_eq!((error.kind(), error.outcome()), (ErrorKind::Unavailable, Outcome::NotDone));
    for tries in 0.. {
        match old.ensure(&cx(LONG), vm_id, Rev(2), &vm()).await {
            Ok(_) => break,
            Err(e) => assert!(tries < 100, "the old client did not connect again: {e:#}"),
        }
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn garbage_ends_its_own_session_only() {
    let (_, host) = world();
    let server = Server::new(Served::new().host(host));
    let good = client(&server, Dialect::CURRENT).await.unwrap().host().unwrap().hypervisor;
    for garbage in [&[0xff; 64][..], &[0, 0, 0, 3, 1, 2, 3], &[0, 0, 0, 0]] {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let served = server.clone();
        let session = tokio::spawn(async move { served.session(theirs).await });
        ours.write_all(garbage).await.unwrap();
        assert!(session.await.unwrap().is_err());
    }
    good.hello().await.unwrap();
}

#[tokio::test]
async fn changes_and_consoles_cross() {
    let (_, host) = world();
    let remote = client(&Server::new(Served::new().host(host)), Dialect::CURRENT).await.unwrap();
    let vms = remote.host().unwrap().hypervisor;
    let mut changes = vms.changes(&cx(LONG)).await.unwrap();
    let vm_id = id();
    vms.ensure(&cx(LONG), vm_id, Rev(1), &vm()).await.unwrap();
    assert_eq!(changes.next().await.unwrap().unwrap(), vm_id.object());
    let mut console = vms.console(&cx(LONG), vm_id, 0).await.unwrap();
    assert!(String::from_utf8_lossy(&console.read().await.unwrap().unwrap()).contains("GUEST-READY"));
    // A read that waits does not keep a write back, and its item is not lost when its reader goes away.
    let waited = tokio::time::timeout(Duration::from_millis(20), console.read()).await;
    assert!(waited.is_err());
    console.write(Bytes::from_static(b"typed")).await.unwrap();
    assert_eq!(console.read().await.unwrap().unwrap(), Bytes::from_static(b"typed"));
}
