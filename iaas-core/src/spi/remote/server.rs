//! The side of the providers: sessions, and each call as a task of its own.

use std::collections::BTreeMap;
use std::collections::HashMap;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use tokio::net::UnixListener;
use tokio::net::UnixStream;
use tokio::net::unix::OwnedReadHalf;
use tokio::sync::Semaphore;
use tokio::sync::mpsc;
use tokio::sync::oneshot;

use super::Dialect;
use super::Part;
use super::artifact;
use super::block;
use super::client::EnsureArgs;
use super::client::PageArgs;
use super::client::RemoveArgs;
use super::frame;
use super::frame::Ask;
use super::frame::Card;
use super::frame::Down;
use super::frame::HostCard;
use super::frame::PoolCard;
use super::frame::Up;
use super::frame::decode;
use super::frame::encode;
use super::gate::Gates;
use super::gate::Inside;
use super::host;
use super::hypervisor;
use super::meter;
use super::network;
use super::stream;
use super::stream::StreamArgs;
use super::stream::Wish;
use crate::Error;
use crate::ErrorKind;
use crate::Id;
use crate::ObjectRef;
use crate::Outcome;
use crate::Result;
use crate::id::Fabric;
use crate::id::Pool;
use crate::spi::Cancel;
use crate::spi::Converge;
use crate::spi::Ctx;
use crate::spi::Kind;
use crate::spi::Provider;
use crate::spi::block::VolumePool;
use crate::spi::host::HostProviders;
use crate::spi::meter::MeterSink;
use crate::spi::network::NetProgram;

/// The most calls in flight of one session.
const MAX_CALLS: usize = 1024;
/// The most open streams of one session.
const MAX_STREAMS: usize = 256;
/// The most sessions.
const MAX_SESSIONS: usize = 64;
/// How long a peer may take to greet.
const GREETING: Duration = Duration::from_secs(10);

/// The providers that a server answers with.
#[derive(Clone, Debug, Default)]
pub struct Served {
    host: Option<HostProviders>,
    pools: BTreeMap<Id<Pool>, Arc<dyn VolumePool>>,
    fabrics: BTreeMap<Id<Fabric>, Arc<dyn NetProgram>>,
    meter: Option<Arc<dyn MeterSink>>,
}

impl Served {
    /// Nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Serves a host's providers.
    #[must_use]
    pub fn host(mut self, host: HostProviders) -> Self {
        self.host = Some(host);
        self
    }

    /// Serves a pool.
    #[must_use]
    pub fn pool(mut self, id: Id<Pool>, pool: Arc<dyn VolumePool>) -> Self {
        self.pools.insert(id, pool);
        self
    }

    /// Serves a network.
    #[must_use]
    pub fn network(mut self, id: Id<Fabric>, network: Arc<dyn NetProgram>) -> Self {
        self.fabrics.insert(id, network);
        self
    }

    /// Serves a meter.
    #[must_use]
    pub fn meter(mut self, meter: Arc<dyn MeterSink>) -> Self {
        self.meter = Some(meter);
        self
    }

    fn card(&self) -> Card {
        let host = |h: &HostProviders| HostCard {
            id: h.id,
            fabric: h.fabric,
            access: h.access.keys().copied().collect(),
            power: h.power.is_some(),
            images: h.hypervisor.images().is_some(),
            handovers: h.hypervisor.handovers().is_some(),
        };
        let pool = |p: &Arc<dyn VolumePool>| PoolCard {
            snapshots: p.snapshots().is_some(),
            jobs: p.jobs().is_some(),
        };
        Card {
            host: self.host.as_ref().map(host),
            pools: self.pools.iter().map(|(id, p)| (*id, pool(p))).collect(),
            fabrics: self.fabrics.keys().copied().collect(),
            meter: self.meter.is_some(),
        }
    }

    /// Answers one call.
    async fn answer(&self, ask: &Ask, cx: Option<&Ctx>) -> Result<Answer> {
        let absent = || Error::not_found(format!("{:?} does not stand behind this socket", ask.part));
        match ask.part {
            Part::Pool(id) | Part::Snapshots(id) | Part::Jobs(id) => {
                let pool = self.pools.get(&id).ok_or_else(absent)?;
                block::answer_pool(&**pool, ask, cx).await
            }
            Part::Network(id) => {
                network::answer_net(&**self.fabrics.get(&id).ok_or_else(absent)?, ask, cx).await
            }
            Part::Meter => meter::answer(&**self.meter.as_ref().ok_or_else(absent)?, ask).await,
            _ => self.answer_host(self.host.as_ref().ok_or_else(absent)?, ask, cx).await,
        }
    }

    async fn answer_host(&self, host: &HostProviders, ask: &Ask, cx: Option<&Ctx>) -> Result<Answer> {
        let absent = || Error::not_found(format!("{:?} does not stand behind this socket", ask.part));
        match ask.part {
            Part::Inventory => host::answer_inventory(&*host.inventory, ask, cx).await,
            Part::Power => host::answer_power(&**host.power.as_ref().ok_or_else(absent)?, ask, cx).await,
            Part::Hypervisor | Part::Images | Part::Handovers => {
                hypervisor::answer(&*host.hypervisor, ask, cx).await
            }
            Part::Artifacts => artifact::answer(&*host.artifacts, ask, cx).await,
            Part::Access(pool) => {
                converge::<crate::spi::block::Access>(&**host.access.get(&pool).ok_or_else(absent)?, ask, cx)
                    .await
            }
            Part::Plugs => converge::<crate::spi::network::Plug>(&*host.plugs, ask, cx).await,
            _ => Err(absent()),
        }
    }
}

/// What a call gives back.
pub(super) enum Answer {
    Body(Vec<u8>),
    Stream(stream::Served),
}

impl Answer {
    pub(super) fn of<T: serde::Serialize>(value: &T) -> Result<Self> {
        encode(value).map(Self::Body)
    }
}

/// The context that a verb needs.
pub(super) fn need(cx: Option<&Ctx>) -> Result<&Ctx> {
    cx.ok_or_else(|| Error::invalid("the call has no context"))
}

pub(super) fn no_verb(ask: &Ask) -> Error {
    Error::unsupported(format!("{:?} has no verb `{}` for {:?}", ask.part, ask.verb, ask.kind))
        .remedy("upgrade the older side")
}

/// The verbs of every provider.
pub(super) async fn provider(provider: &dyn Provider, ask: &Ask, cx: Option<&Ctx>) -> Result<Answer> {
    match ask.verb.as_str() {
        "hello" => Answer::of(&provider.hello().await?),
        "claim" => Answer::of(&provider.claim(need(cx)?).await?),
        "changes" => Ok(Answer::Stream(stream::Served::Feed(provider.changes(need(cx)?).await?))),
        "usage" => {
            let PageArgs { after, limit } = decode::<PageArgs<ObjectRef>>(&ask.args)?;
            page(&provider.usage(need(cx)?, after, limit).await?)
        }
        _ => Err(no_verb(ask)),
    }
}

/// The four verbs of a kind, then those of every provider.
pub(super) async fn converge<K: Kind>(site: &dyn Converge<K>, ask: &Ask, cx: Option<&Ctx>) -> Result<Answer> {
    if ask.kind.as_deref() != Some(K::NAME) {
        return provider(site, ask, cx).await;
    }
    let cx = need(cx)?;
    match ask.verb.as_str() {
        "ensure" => {
            let EnsureArgs { id, rev, spec } = decode(&ask.args)?;
            let spec: K::Spec = decode(&spec)?;
            Answer::of(&site.ensure(cx, Id::from_uuid(id), rev, &spec).await?)
        }
        "remove" => {
            let RemoveArgs { id, upto } = decode(&ask.args)?;
            Answer::of(&site.remove(cx, Id::from_uuid(id), upto).await?)
        }
        "observe" => Answer::of(&site.observe(cx, Id::from_uuid(decode(&ask.args)?)).await?),
        "inventory" => {
            let PageArgs { after, limit } = decode::<PageArgs<uuid::Uuid>>(&ask.args)?;
            page(&site.inventory(cx, after.map(Id::from_uuid), limit).await?)
        }
        _ => Err(no_verb(ask)),
    }
}

/// Items that are encoded one by one, so that one that the reader does not understand does not spoil the others.
fn page<T: serde::Serialize>(items: &[T]) -> Result<Answer> {
    let items = items.iter().map(|item| encode(item).map(Bytes::from)).collect::<Result<Vec<_>>>()?;
    Answer::of(&items)
}

/// Answers calls over unix sockets. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Server(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    served: Served,
    dialect: Dialect,
    gates: Gates,
    sessions: AtomicU64,
    room: Arc<Semaphore>,
}

impl Server {
    /// A server of these providers.
    pub fn new(served: Served) -> Self {
        Self::speaking(served, Dialect::CURRENT)
    }

    /// A server that speaks `dialect`.
    #[doc(hidden)]
    pub fn speaking(served: Served, dialect: Dialect) -> Self {
        Self(Arc::new(Inner {
            served,
            dialect,
            gates: Gates::new(),
            sessions: AtomicU64::new(1),
            room: Arc::new(Semaphore::new(MAX_SESSIONS)),
        }))
    }

    /// Takes connections until the future is dropped. Peers must be this user or root.
    ///
    /// # Errors
    /// `Unavailable` if the listener fails for good.
    pub async fn serve(&self, listener: UnixListener) -> Result<()> {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    let server = self.clone();
                    tokio::spawn(async move {
                        if let Err(error) = server.session(stream).await {
                            tracing::warn!(%error, "a session of the remote SPI ended");
                        }
                    });
                }
                // Out of descriptors: those who are connected go on, and may close some.
                Err(e) if matches!(e.raw_os_error(), Some(libc_emfile::EMFILE | libc_emfile::ENFILE)) => {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                Err(e) if e.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(e) => return Err(Error::unavailable("the socket takes no connections").because(&e)),
            }
        }
    }

    /// Serves one connection until it ends. Calls that run then run on.
    ///
    /// # Errors
    /// `Denied` for a peer of another user; `Unavailable` if there are too many sessions or the connection breaks.
    pub async fn session(&self, stream: UnixStream) -> Result<()> {
        known_peer(&stream)?;
        let _room = self.0.room.clone().try_acquire_owned().map_err(|_| {
            Error::new(ErrorKind::RateLimited, "there are too many sessions").remedy("close some")
        })?;
        let (mut read, write) = stream.into_split();
        let (send, queue) = mpsc::channel(MAX_CALLS);
        tokio::spawn(frame::write_all(write, queue));
        let broken = |e: io::Error| Error::unavailable("the connection broke").because(&e);
        let greeting = tokio::time::timeout(GREETING, frame::read::<Up>(&mut read)).await;
        let hello =
            greeting.map_err(|_| Error::unavailable("the peer did not greet in time"))?.map_err(broken)?;
        let Some(Up::Hello { protocol }) = hello else {
            return Err(Error::invalid("the peer did not greet first"));
        };
        let session = Session {
            server: self.clone(),
            number: self.0.sessions.fetch_add(1, Ordering::Relaxed),
            protocol: self.welcome(protocol, &send).await?,
            send: Mutex::new(Some(send)),
            cancels: Mutex::default(),
            streams: Mutex::default(),
        };
        Arc::new(session).listen(read).await.map_err(broken)
    }

    /// Answers the greeting.
    async fn welcome(&self, theirs: (u16, u16), send: &mpsc::Sender<Vec<u8>>) -> Result<u16> {
        let common = self.0.dialect.common(theirs);
        let answer = match &common {
            Ok(protocol) => Down::Welcome { protocol: *protocol, card: self.0.served.card() },
            Err(error) => Down::Refused { error: error.clone() },
        };
        let closed = |_| Error::unavailable("the peer went away");
        send.send(frame::frame(&answer)?).await.map_err(closed)?;
        common
    }
}

/// `errno` values of exhausted descriptor tables on Linux.
mod libc_emfile {
    pub(super) const EMFILE: i32 = 24;
    pub(super) const ENFILE: i32 = 23;
}

/// Refuses a peer that is neither this user nor root.
pub(super) fn known_peer(stream: &UnixStream) -> Result<()> {
    let peer = stream.peer_cred().map_err(|e| Error::unavailable("the peer is not known").because(&e))?;
    let ours = nix::unistd::geteuid().as_raw();
    if peer.uid() == 0 || peer.uid() == ours {
        return Ok(());
    }
    Err(Error::denied("the other side of the socket is another user's")
        .remedy("run both sides as the same user")
        .detail(format!("peer uid {}, ours {ours}", peer.uid())))
}

/// Where a stream takes wishes, and for which cloud it was opened.
type OpenStream = (mpsc::Sender<Wish>, Option<Id<crate::id::Cloud>>);

/// One connection.
struct Session {
    server: Server,
    number: u64,
    protocol: u16,
    /// `None` once the session has ended: what still runs has nobody to answer to.
    send: Mutex<Option<mpsc::Sender<Vec<u8>>>>,
    cancels: Mutex<HashMap<u64, Cancel>>,
    streams: Mutex<HashMap<u64, OpenStream>>,
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Session({})", self.number)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Session {
    async fn listen(self: Arc<Self>, mut read: OwnedReadHalf) -> io::Result<()> {
        let ended = loop {
            match frame::read(&mut read).await {
                Ok(Some(Up::Ask(ask))) => {
                    if !self.clone().take(*ask).await {
                        break Ok(());
                    }
                }
                Ok(Some(Up::Cancel { id })) => {
                    if let Some(cancel) = lock(&self.cancels).get(&id) {
                        cancel.cancel();
                    }
                }
                Ok(Some(Up::Hello { .. })) => break Err(io::Error::other("the peer greeted twice")),
                Ok(None) => break Ok(()),
                Err(e) => break Err(e),
            }
        };
        // Ends the streams and, once it has sent what waits, the connection. Calls run on, for their effects.
        lock(&self.streams).clear();
        lock(&self.send).take();
        ended
    }

    /// Starts a call, in the order of arrival. `false`: this session is over.
    async fn take(self: Arc<Self>, ask: Ask) -> bool {
        let admitted = match ask.verb.strip_prefix("stream.") {
            Some(_) => self.admit_stream(&ask),
            None => self.admit(&ask),
        };
        match admitted {
            Err(error) => self.reply(ask.id, Err(error)).await,
            Ok(Admitted::Nothing) => {}
            Ok(Admitted::Stale) => {
                let stale = Error::unavailable("a newer session has claimed this provider");
                self.reply(ask.id, Err(stale.outcome_is(Outcome::NotDone).remedy("call again"))).await;
                return false;
            }
            Ok(Admitted::Answer(answer)) => {
                tokio::spawn(async move {
                    let body = answer.await.unwrap_or_else(|_| Err(stream::gone()));
                    self.reply(ask.id, body).await;
                });
            }
            Ok(Admitted::Call { cx, inside }) => {
                tokio::spawn(async move {
                    let body = self.run(&ask, cx.as_ref(), inside.as_ref()).await;
                    lock(&self.cancels).remove(&ask.id);
                    drop(inside);
                    self.reply(ask.id, body).await;
                });
            }
        }
        true
    }

    fn admit(&self, ask: &Ask) -> Result<Admitted> {
        let mut cancels = lock(&self.cancels);
        if cancels.len() >= MAX_CALLS {
            return Err(Error::new(ErrorKind::RateLimited, "too many calls are in flight")
                .retry_in(Duration::from_millis(100))
                .outcome_is(Outcome::NotDone));
        }
        let cx = ask.call.clone().map(|call| Ctx { call, cancel: Cancel::new() });
        let enter = |cx: &Ctx| self.server.0.gates.enter(ask.part, cx.call.cloud, self.number);
        let inside = cx.as_ref().and_then(enter);
        if cx.is_some() && inside.is_none() {
            return Ok(Admitted::Stale);
        }
        cancels.insert(ask.id, cx.as_ref().map(|cx| cx.cancel.clone()).unwrap_or_default());
        Ok(Admitted::Call { cx, inside })
    }

    /// Hands a wish to its stream.
    fn admit_stream(&self, ask: &Ask) -> Result<Admitted> {
        let StreamArgs { stream, bytes } = decode(&ask.args)?;
        let (to, cloud) = lock(&self.streams).get(&stream).cloned().ok_or_else(stream::gone)?;
        if ask.verb == "stream.drop" {
            lock(&self.streams).remove(&stream);
            return Ok(Admitted::Nothing);
        }
        // A read changes nothing, and may wait for ever.
        let changes = ask.verb != "stream.read";
        let enter = |cloud| self.server.0.gates.enter(ask.part, cloud, self.number);
        let cloud = cloud.filter(|_| changes);
        let inside = cloud.and_then(enter);
        if cloud.is_some() && inside.is_none() {
            return Ok(Admitted::Stale);
        }
        let (answer, told) = oneshot::channel();
        let wish = Wish { verb: ask.verb.clone(), bytes, answer, inside };
        to.try_send(wish).map_err(|_| {
            Error::new(ErrorKind::RateLimited, "the stream is busy").outcome_is(Outcome::NotDone)
        })?;
        Ok(Admitted::Answer(told))
    }

    async fn run(&self, ask: &Ask, cx: Option<&Ctx>, inside: Option<&Inside>) -> Result<Bytes> {
        if ask.verb == "echo" && self.protocol >= 2 {
            return encode(&ask.note.clone().unwrap_or_default()).map(Bytes::from);
        }
        if let (true, Some(inside)) = (ask.verb == "claim", inside) {
            self.server.0.gates.claim(inside).await;
        }
        match self.server.0.served.answer(ask, cx).await? {
            Answer::Body(body) => Ok(body.into()),
            Answer::Stream(stream) => self.open(ask.id, stream, cx),
        }
    }

    /// Keeps a stream under the number of the call that opened it.
    fn open(&self, id: u64, stream: stream::Served, cx: Option<&Ctx>) -> Result<Bytes> {
        let mut streams = lock(&self.streams);
        if streams.len() >= MAX_STREAMS {
            return Err(Error::new(ErrorKind::RateLimited, "too many streams are open").remedy("close some"));
        }
        let (send, wishes) = mpsc::channel(4);
        streams.insert(id, (send, cx.map(|cx| cx.call.cloud)));
        tokio::spawn(stream::serve(stream, wishes));
        encode(&id).map(Bytes::from)
    }

    async fn reply(&self, id: u64, body: Result<Bytes>) {
        let frame = frame::frame(&Down::Reply { id, body }).or_else(|error| {
            let error = error.outcome_is(Outcome::Unknown);
            frame::frame(&Down::Reply { id, body: Err(error) })
        });
        let send = lock(&self.send).clone();
        if let (Ok(frame), Some(send)) = (frame, send) {
            // A peer that went away wants no answer.
            let _ = send.send(frame).await;
        }
    }
}

/// What becomes of a call.
enum Admitted {
    Call {
        cx: Option<Ctx>,
        inside: Option<Inside>,
    },
    Answer(oneshot::Receiver<Result<Bytes>>),
    Nothing,
    /// A newer session has claimed.
    Stale,
}
