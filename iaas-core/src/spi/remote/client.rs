//! The calling side: a connection that is dialled again when it is lost, and objects that implement the traits over it.

use std::collections::BTreeMap;
use std::collections::HashMap;
use std::fmt;
use std::io;
use std::os::unix::net::UnixStream as StdStream;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::sync::Weak;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use serde::Deserialize;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio::net::unix::OwnedReadHalf;
use tokio::sync::mpsc;
use tokio::sync::oneshot;

use super::Dialect;
use super::Part;
use super::frame;
use super::frame::Ask;
use super::frame::Card;
use super::frame::Down;
use super::frame::Up;
use super::frame::decode;
use super::frame::encode;
use super::stream::RemoteFeed;
use crate::Error;
use crate::ErrorKind;
use crate::Id;
use crate::ObjectRef;
use crate::Outcome;
use crate::Result;
use crate::Rev;
use crate::id::Fabric;
use crate::id::Pool;
use crate::spi::Converge;
use crate::spi::Ctx;
use crate::spi::Feed;
use crate::spi::Found;
use crate::spi::Hello;
use crate::spi::Kind;
use crate::spi::Provider;
use crate::spi::Reading;
use crate::spi::Seen;
use crate::spi::Tag;
use crate::spi::block::VolumePool;
use crate::spi::host::HostProviders;
use crate::spi::meter::MeterSink;
use crate::spi::network::NetProgram;

/// Frames that wait to be sent; one more is refused with `RateLimited`.
const SEND_QUEUE: usize = 256;
/// How long the greeting may take.
const GREETING: Duration = Duration::from_secs(10);
/// The time of a call without a budget of its own.
const DEFAULT_BUDGET: Duration = Duration::from_secs(30);
/// What a call's answer may be late, so that the other side's own time-out is heard.
const GRACE: Duration = Duration::from_secs(1);

/// Providers in another process, reached over a unix socket. Cheap to clone; needs a tokio runtime.
#[derive(Clone, Debug)]
pub struct Remote {
    client: Arc<Client>,
    card: Card,
}

impl Remote {
    /// Connects to the socket at `path`, which must belong to this user or to root.
    ///
    /// # Errors
    /// `Unavailable` if nobody listens; `Unsupported` if no protocol is common; `Denied` if the socket is another user's.
    pub async fn connect(path: impl AsRef<Path>) -> Result<Self> {
        Self::dial(Dial::Path(path.as_ref().to_owned()), Dialect::CURRENT).await
    }

    /// Connects by `dial`, which is called again whenever the connection is lost.
    ///
    /// # Errors
    /// As [`connect`](Self::connect).
    pub async fn over(
        dial: impl Fn() -> io::Result<StdStream> + Send + Sync + 'static,
        dialect: Dialect,
    ) -> Result<Self> {
        Self::dial(Dial::By(Box::new(dial)), dialect).await
    }

    async fn dial(dial: Dial, dialect: Dialect) -> Result<Self> {
        let client = Arc::new(Client { dial, dialect, link: tokio::sync::Mutex::default() });
        let card = client.link().await?.card.clone();
        Ok(Self { client, card })
    }

    /// The host behind the socket.
    ///
    /// # Errors
    /// `NotFound` if there is none.
    pub fn host(&self) -> Result<HostProviders> {
        let host =
            self.card.host.clone().ok_or_else(|| Error::not_found("no host stands behind this socket"))?;
        let part = |part| Arc::new(self.part(part));
        let access =
            |pool: &Id<Pool>| (*pool, part(Part::Access(*pool)) as Arc<dyn crate::spi::block::VolumeAccess>);
        Ok(HostProviders {
            id: host.id,
            inventory: part(Part::Inventory),
            hypervisor: part(Part::Hypervisor),
            artifacts: part(Part::Artifacts),
            access: host.access.iter().map(access).collect::<BTreeMap<_, _>>(),
            plugs: part(Part::Plugs),
            fabric: host.fabric,
            power: host.power.then(|| part(Part::Power) as _),
        })
    }

    /// A pool behind the socket.
    ///
    /// # Errors
    /// `NotFound` if it is not there.
    pub fn pool(&self, id: Id<Pool>) -> Result<Arc<dyn VolumePool>> {
        let there = self.card.pools.contains_key(&id);
        self.there(there, Part::Pool(id)).map(|part| Arc::new(part) as _)
    }

    /// A network behind the socket.
    ///
    /// # Errors
    /// `NotFound` if it is not there.
    pub fn network(&self, id: Id<Fabric>) -> Result<Arc<dyn NetProgram>> {
        let there = self.card.fabrics.contains(&id);
        self.there(there, Part::Network(id)).map(|part| Arc::new(part) as _)
    }

    /// The meter behind the socket.
    ///
    /// # Errors
    /// `NotFound` if there is none.
    pub fn meter(&self) -> Result<Arc<dyn MeterSink>> {
        self.there(self.card.meter, Part::Meter).map(|part| Arc::new(part) as _)
    }

    /// The verb of the next protocol: gives the note back.
    #[doc(hidden)]
    pub async fn echo(&self, note: &str) -> Result<String> {
        let link = self.client.link().await?;
        if link.protocol < 2 {
            return Err(Error::unsupported("the other side is older and has no `echo`"));
        }
        let ask = Ask { note: Some(note.to_owned()), ..ask(Part::Meter, None, "echo", None, &())? };
        decode(&link.ask(ask, None).await?)
    }

    /// The protocol of the connection.
    ///
    /// # Errors
    /// As [`connect`](Self::connect).
    pub async fn protocol(&self) -> Result<u16> {
        Ok(self.client.link().await?.protocol)
    }

    fn there(&self, there: bool, part: Part) -> Result<RemotePart> {
        if there {
            return Ok(self.part(part));
        }
        Err(Error::not_found(format!("{part:?} does not stand behind this socket")))
    }

    fn part(&self, part: Part) -> RemotePart {
        let under = |there: bool, part| there.then(|| Box::new(self.part(part)));
        let host = self.card.host.as_ref();
        let (first, second) = match part {
            Part::Hypervisor => (
                under(host.is_some_and(|h| h.images), Part::Images),
                under(host.is_some_and(|h| h.handovers), Part::Handovers),
            ),
            Part::Pool(id) => {
                let card = self.card.pools.get(&id).copied().unwrap_or_default();
                (under(card.snapshots, Part::Snapshots(id)), under(card.jobs, Part::Jobs(id)))
            }
            _ => (None, None),
        };
        RemotePart { client: self.client.clone(), part, first, second }
    }
}

/// One provider of the other side; it implements every trait, and answers the verbs of its own.
#[derive(Debug)]
pub struct RemotePart {
    pub(super) client: Arc<Client>,
    pub(super) part: Part,
    /// Checkpoints of a hypervisor, snapshots of a pool.
    pub(super) first: Option<Box<RemotePart>>,
    /// Migrations of a hypervisor, jobs of a pool.
    pub(super) second: Option<Box<RemotePart>>,
}

impl RemotePart {
    /// Calls `verb` and reads its answer.
    pub(super) async fn call<T: DeserializeOwned>(
        &self,
        verb: &str,
        cx: &Ctx,
        args: &impl Serialize,
    ) -> Result<T> {
        unreadable(&self.raw(None, verb, Some(cx), args).await?)
    }

    pub(super) async fn raw(
        &self,
        kind: Option<&str>,
        verb: &str,
        cx: Option<&Ctx>,
        args: &impl Serialize,
    ) -> Result<Bytes> {
        let ask = ask(self.part, kind, verb, cx, args)?;
        self.client.link().await?.ask(ask, cx).await
    }
}

/// Reads an answer. The call was made, so what it did is not known if that fails.
pub(super) fn unreadable<T: DeserializeOwned>(body: &[u8]) -> Result<T> {
    decode(body).map_err(|e| e.outcome_is(Outcome::Unknown))
}

fn ask(part: Part, kind: Option<&str>, verb: &str, cx: Option<&Ctx>, args: &impl Serialize) -> Result<Ask> {
    Ok(Ask {
        id: 0,
        part,
        kind: kind.map(str::to_owned),
        verb: verb.to_owned(),
        call: cx.map(|cx| cx.call.clone()),
        args: encode(args)?.into(),
        note: None,
    })
}

/// The arguments of the four verbs, as they cross.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct EnsureArgs {
    pub(super) id: uuid::Uuid,
    pub(super) rev: Rev,
    pub(super) spec: Bytes,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct RemoveArgs {
    pub(super) id: uuid::Uuid,
    pub(super) upto: Rev,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct PageArgs<T> {
    pub(super) after: Option<T>,
    pub(super) limit: usize,
}

#[async_trait]
impl Provider for RemotePart {
    async fn hello(&self) -> Result<Hello> {
        unreadable(&self.raw(None, "hello", None, &()).await?)
    }

    async fn claim(&self, cx: &Ctx) -> Result<Hello> {
        self.call("claim", cx, &()).await
    }

    async fn changes(&self, cx: &Ctx) -> Result<Feed<ObjectRef>> {
        let link = self.client.link().await?;
        let stream = unreadable(&link.ask(ask(self.part, None, "changes", Some(cx), &())?, Some(cx)).await?)?;
        Ok(Box::new(RemoteFeed::new(link, self.part, stream)))
    }

    async fn usage(&self, cx: &Ctx, after: Option<ObjectRef>, limit: usize) -> Result<Vec<Reading>> {
        let page: Vec<Bytes> = self.call("usage", cx, &PageArgs { after, limit }).await?;
        // Totals are cumulative, so one that cannot be read costs nothing: the next one has it.
        Ok(page.iter().filter_map(|item| decode(item).ok()).collect())
    }
}

#[async_trait]
impl<K: Kind> Converge<K> for RemotePart {
    async fn ensure(&self, cx: &Ctx, id: Id<K>, rev: Rev, spec: &K::Spec) -> Result<Seen<K>> {
        let args = EnsureArgs { id: id.uuid(), rev, spec: encode(spec)?.into() };
        unreadable(&self.raw(Some(K::NAME), "ensure", Some(cx), &args).await?)
    }

    async fn remove(&self, cx: &Ctx, id: Id<K>, upto: Rev) -> Result<()> {
        let args = RemoveArgs { id: id.uuid(), upto };
        unreadable(&self.raw(Some(K::NAME), "remove", Some(cx), &args).await?)
    }

    async fn observe(&self, cx: &Ctx, id: Id<K>) -> Result<Option<Seen<K>>> {
        unreadable(&self.raw(Some(K::NAME), "observe", Some(cx), &id.uuid()).await?)
    }

    async fn inventory(&self, cx: &Ctx, after: Option<Id<K>>, limit: usize) -> Result<Vec<Found<K>>> {
        let args = PageArgs { after: after.map(Id::uuid), limit };
        let body = self.raw(Some(K::NAME), "inventory", Some(cx), &args).await?;
        unreadable::<Vec<Bytes>>(&body)?.iter().map(|item| found(item)).collect()
    }
}

/// An item of an inventory. What it is may be unreadable; that it is there is not lost.
fn found<K: Kind>(item: &[u8]) -> Result<Found<K>> {
    #[derive(Deserialize)]
    struct Bare {
        id: uuid::Uuid,
        tag: Tag,
        #[serde(default)]
        passport: Option<Bytes>,
    }
    decode::<Found<K>>(item).or_else(|error| {
        let Bare { id, tag, passport } = unreadable(item)?;
        Ok(Found { id: Id::from_uuid(id), tag, passport, seen: Err(error) })
    })
}

/// How to reach the other side.
enum Dial {
    Path(PathBuf),
    By(Box<dyn Fn() -> io::Result<StdStream> + Send + Sync>),
}

impl fmt::Debug for Dial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => path.fmt(f),
            Self::By(_) => f.write_str("by a function"),
        }
    }
}

/// Dials, and keeps the connection until it is lost.
#[derive(Debug)]
pub(super) struct Client {
    dial: Dial,
    dialect: Dialect,
    link: tokio::sync::Mutex<Option<Arc<Link>>>,
}

impl Client {
    /// The connection; a new one if there is none. Errors are `NotDone`: no call was made.
    pub(super) async fn link(&self) -> Result<Arc<Link>> {
        let mut kept = self.link.lock().await;
        if let Some(link) = kept.as_ref().filter(|link| !link.is_dead()) {
            return Ok(link.clone());
        }
        let link = self.greet().await.map_err(|e| e.outcome_is(Outcome::NotDone))?;
        *kept = Some(link.clone());
        Ok(link)
    }

    async fn greet(&self) -> Result<Arc<Link>> {
        let stream = self.stream().await.map_err(|e| {
            Error::unavailable(format!("{:?} does not answer", self.dial))
                .remedy("see whether the process behind the socket runs")
                .because(&e)
        })?;
        super::server::known_peer(&stream)?;
        let greeting = tokio::time::timeout(GREETING, Link::greet(stream, self.dialect)).await;
        greeting.unwrap_or_else(|_| Err(Error::unavailable("the greeting took too long")))
    }

    async fn stream(&self) -> io::Result<UnixStream> {
        match &self.dial {
            Dial::Path(path) => UnixStream::connect(path).await,
            Dial::By(dial) => {
                let stream = dial()?;
                stream.set_nonblocking(true)?;
                UnixStream::from_std(stream)
            }
        }
    }
}

/// One connection.
#[derive(Debug)]
pub(super) struct Link {
    send: mpsc::Sender<Vec<u8>>,
    waiting: Mutex<HashMap<u64, oneshot::Sender<Result<Bytes>>>>,
    next: AtomicU64,
    dead: AtomicBool,
    protocol: u16,
    card: Card,
}

impl Link {
    async fn greet(stream: UnixStream, dialect: Dialect) -> Result<Arc<Self>> {
        let lost = |e: io::Error| Error::unavailable("the connection was lost in the greeting").because(&e);
        let (mut read, write) = stream.into_split();
        let (send, queue) = mpsc::channel(SEND_QUEUE);
        tokio::spawn(frame::write_all(write, queue));
        let hello = Up::Hello { protocol: (dialect.oldest, dialect.newest) };
        let full = |_| Error::unavailable("the connection was lost in the greeting");
        send.try_send(frame::frame(&hello)?).map_err(full)?;
        let (protocol, card) = match frame::read::<Down>(&mut read).await.map_err(lost)? {
            Some(Down::Welcome { protocol, card }) => (protocol, card),
            Some(Down::Refused { error }) => return Err(error),
            Some(Down::Reply { .. }) | None => {
                return Err(Error::unavailable("the other side ended the greeting"));
            }
        };
        dialect.common((protocol, protocol))?;
        let link = Arc::new(Self {
            send,
            waiting: Mutex::default(),
            next: AtomicU64::new(1),
            dead: AtomicBool::new(false),
            protocol,
            card,
        });
        tokio::spawn(Self::listen(Arc::downgrade(&link), read));
        Ok(link)
    }

    /// Hands answers to those who wait, until the connection is lost.
    ///
    /// It does not hold the link: with its last holder the link's `send` goes, which closes the connection.
    async fn listen(link: Weak<Self>, mut read: OwnedReadHalf) {
        while let Ok(Some(Down::Reply { id, body })) = frame::read(&mut read).await {
            let Some(link) = link.upgrade() else { return };
            if let Some(waiter) = link.waiting().remove(&id) {
                // Who has gone away does not want the answer.
                let _ = waiter.send(body);
            }
        }
        let Some(link) = link.upgrade() else { return };
        link.dead.store(true, Ordering::SeqCst);
        for (_, waiter) in link.waiting().drain() {
            let _ = waiter.send(Err(reset()));
        }
    }

    fn is_dead(&self) -> bool {
        self.dead.load(Ordering::SeqCst) || self.send.is_closed()
    }

    fn waiting(&self) -> MutexGuard<'_, HashMap<u64, oneshot::Sender<Result<Bytes>>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a call and waits for its answer, within the time of `cx`.
    pub(super) async fn ask(&self, ask: Ask, cx: Option<&Ctx>) -> Result<Bytes> {
        let mut answer = self.begin(ask)?;
        let budget = cx.map_or(DEFAULT_BUDGET, |cx| cx.call.budget);
        let late = tokio::time::sleep(budget.saturating_add(GRACE));
        tokio::pin!(late);
        let mut asked_to_stop = false;
        loop {
            let cancelled = async {
                match cx {
                    Some(cx) if !asked_to_stop => cx.cancel.cancelled().await,
                    _ => std::future::pending().await,
                }
            };
            tokio::select! {
                body = answer.wait() => return body,
                () = cancelled => {
                    asked_to_stop = true;
                    self.post(&Up::Cancel { id: answer.id });
                }
                () = &mut late => {
                    return Err(Error::timeout("no answer came in time").remedy("observe before acting again"));
                }
            }
        }
    }

    /// Sends a call; its answer is waited for apart.
    pub(super) fn begin(&self, mut ask: Ask) -> Result<Answer<'_>> {
        let (tell, told) = oneshot::channel();
        ask.id = self.next.fetch_add(1, Ordering::Relaxed);
        let frame = frame::frame(&Up::Ask(Box::new(ask.clone())))?;
        self.waiting().insert(ask.id, tell);
        let answer = Answer { link: self, id: ask.id, told };
        self.send.try_send(frame).map_err(|e| match e {
            mpsc::error::TrySendError::Full(_) => {
                Error::new(ErrorKind::RateLimited, "the send queue is full")
                    .retry_in(Duration::from_millis(100))
                    .outcome_is(Outcome::NotDone)
            }
            mpsc::error::TrySendError::Closed(_) => {
                Error::unavailable("the connection is closed").outcome_is(Outcome::NotDone)
            }
        })?;
        if self.dead.load(Ordering::SeqCst) {
            return Err(reset());
        }
        Ok(answer)
    }

    /// Sends what needs no answer; it may be lost.
    pub(super) fn post(&self, up: &Up) {
        if let Ok(frame) = frame::frame(up) {
            let _ = self.send.try_send(frame);
        }
    }
}

fn reset() -> Error {
    Error::unavailable("the connection was lost with the call on its way")
        .outcome_is(Outcome::Unknown)
        .remedy("observe before acting again")
}

/// The answer to a call, when it comes.
pub(super) struct Answer<'a> {
    link: &'a Link,
    pub(super) id: u64,
    told: oneshot::Receiver<Result<Bytes>>,
}

impl Answer<'_> {
    async fn wait(&mut self) -> Result<Bytes> {
        (&mut self.told).await.unwrap_or_else(|_| Err(reset()))
    }

    /// Lets the answer be waited for without a borrow of the link.
    pub(super) fn detach(mut self) -> oneshot::Receiver<Result<Bytes>> {
        let (_, empty) = oneshot::channel();
        self.id = 0;
        std::mem::replace(&mut self.told, empty)
    }
}

impl Drop for Answer<'_> {
    fn drop(&mut self) {
        self.link.waiting().remove(&self.id);
    }
}

/// A further call on an open stream.
pub(super) fn stream_ask(part: Part, verb: &str, args: &impl Serialize) -> Result<Ask> {
    ask(part, None, verb, None, args)
}

/// Waits for a detached answer.
pub(super) async fn told(answer: &mut oneshot::Receiver<Result<Bytes>>) -> Result<Bytes> {
    answer.await.unwrap_or_else(|_| Err(reset()))
}
