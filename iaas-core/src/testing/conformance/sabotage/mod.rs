//! Saboteurs: a clean implementation with one clause broken, to prove that the clause's check notices.
//!
//! A saboteur stands around any implementation and speaks its trait; it spoils one thing.

mod data;
mod kinds;
mod lists;
mod small;
mod traits;

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;

use async_trait::async_trait;
use uuid::Uuid;

use crate::Epoch;
use crate::Error;
use crate::ErrorKind;
use crate::Id;
use crate::ObjectRef;
use crate::Outcome;
use crate::Result;
use crate::Rev;
use crate::spi::Call;
use crate::spi::Converge;
use crate::spi::Ctx;
use crate::spi::Feed;
use crate::spi::Found;
use crate::spi::Hello;
use crate::spi::Kind;
use crate::spi::Provider;
use crate::spi::Reading;
use crate::spi::Seen;

pub use lists::access_saboteurs;
pub use lists::artifacts_saboteurs;
pub use lists::hypervisor_saboteurs;
pub use lists::inventory_saboteurs;
pub use lists::net_saboteurs;
pub use lists::plugs_saboteurs;
pub use lists::pool_saboteurs;
pub use small::audit_saboteurs;
pub use small::keys_saboteurs;
pub use small::placement_saboteurs;

macro_rules! spoils {
    ($($name:ident: $clause:literal, $does:literal;)+) => {
        /// What a saboteur spoils.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum Spoil {
            $($name),+
        }

        impl Spoil {
            /// The clause that it breaks, and how.
            pub(crate) fn about(self) -> (&'static str, &'static str) {
                match self {
                    $(Self::$name => ($clause, $does)),+
                }
            }
        }
    };
}

spoils! {
    HelloRaises: "hello-reads", "raises the epoch when it is greeted";
    ForgetsEpochs: "claim-raises", "forgets epochs when it is restarted";
    ClaimsAtOnce: "claim-drains", "answers a claim before older calls have ended";
    UsageRestarts: "usage-cumulative", "counts from zero after a restart";
    CreatesTwice: "ensure-idempotent", "makes a second thing at the second ensure";
    AcceptsOlder: "ensure-older-conflicts", "accepts an older revision";
    KeepsAfterError: "ensure-after-crash", "does not remove what an error left behind";
    AbsentIsError: "remove-absent-ok", "calls removing nothing an error";
    RemovesNewer: "remove-newer-refused", "removes what is newer than it was told";
    RemovesNothing: "remove-complete", "hides a removed thing instead of removing it";
    ForgetsObjects: "observe-survives-reopen", "sees nothing of before its restart";
    SkipsFirst: "inventory-complete", "leaves the first thing out of its list";
    ListsForeign: "inventory-ours-only", "lists another cloud's things too";
    FencedButDone: "fenced-no-effect", "says Fenced and does it all the same";
    RacesTwice: "concurrent-ensure-one", "makes two things when calls race";
    SaysNotDone: "outcome-honest", "says NotDone of an effect that landed";
    BadIsInternal: "bad-spec-invalid", "calls a bad spec a defect of its own";

    RestartsDead: "boot-at-most-once", "starts an ended boot again";
    IgnoresOff: "off-stops", "does not stop what shall be off";
    IgnoresReboot: "reboot-by-number", "does not start a higher boot number";
    ConsoleFromStart: "console-scrollback", "ignores the console's offset";
    HidesDeath: "death-observed", "says that a killed VM runs";
    KeepsDevices: "devices-by-attachment", "shows devices that have left the spec";
    KindsLie: "kinds-agree", "names kinds that it does not have";
    DropsFinal: "final-usage-kept", "loses the last reading of a life";

    DirtyNew: "new-reads-zero", "shows old bytes in a new volume";
    LosesFlush: "flushed-survives", "answers a flush and does nothing";
    LosesOnGrow: "grow-keeps", "makes a volume anew to grow it";
    LetsStaleWrite: "stale-writer-fenced", "lets an older writer flush";
    FenceLies: "fence-honest", "says that older writers are fenced, and they are not";
    LeaksSpace: "remove-frees", "keeps the space of a removed volume";

    TermOff: "target-when-settled", "gives a target of another term";
    OpensNothing: "absent-volume-blocked", "gives a target for an absent volume";

    AcceptsAnyBytes: "upload-verified", "takes bytes of another digest";
    OneUpload: "upload-resumes", "refuses a second upload after a broken one";

    SyncsInParts: "sync-atomic", "shows an empty program while it takes a new one";
    SyncMerges: "sync-full-replaces", "keeps objects that a full update lacks";
    SyncForces: "sync-mismatch-needs-full", "takes an update from another revision";
    ForgetsProgram: "sync-survives-reopen", "has no program after a restart";
    AcceptsBad: "bad-program-refused", "accepts a program that dangles";
    ExplainFlips: "explain-agrees", "explains a delivered packet as dropped";
    LeaksAcross: "isolation", "floods packets to every VPC";
    PassesSpoofed: "antispoof", "passes packets with false sources";

    KnowsStranger: "unknown-port-drops", "claims a program for an unknown port";
    CountsHeaders: "usage-counts-bytes", "counts its own headers as the guest's bytes";

    ZeroFacts: "facts-absent-not-zero", "says zero for what it could not read";
    OldLease: "lease-answers-host-time", "answers the time of the first lease";
}

/// Makes saboteurs: the wrap that puts a [`Spoiled`] around each provider of a rig.
#[derive(Debug)]
pub(crate) struct Spoiler {
    pub(crate) spoil: Spoil,
    /// What survives a restart: the leaks of a network.
    pub(crate) hub: Arc<data::Hub>,
}

impl Spoiler {
    pub(crate) fn new(spoil: Spoil) -> Self {
        Self { spoil, hub: Arc::default() }
    }

    pub(crate) fn around<P: ?Sized>(&self, inner: Arc<P>, reopened: bool) -> Spoiled<P> {
        Spoiled { inner, spoil: self.spoil, reopened, notes: Mutex::default(), hub: self.hub.clone() }
    }
}

/// An implementation with one clause broken.
#[derive(Debug)]
pub(crate) struct Spoiled<P: ?Sized> {
    pub(crate) spoil: Spoil,
    pub(crate) reopened: bool,
    notes: Mutex<Notes>,
    pub(crate) hub: Arc<data::Hub>,
    pub(crate) inner: Arc<P>,
}

/// What a saboteur remembers, until it is restarted.
#[derive(Debug, Default)]
pub(crate) struct Notes {
    epoch: Option<Epoch>,
    last: Option<Call>,
    clouds: BTreeMap<Uuid, Call>,
    made: BTreeSet<Uuid>,
    failed: BTreeSet<Uuid>,
    hidden: BTreeSet<Uuid>,
    running: BTreeMap<Uuid, u32>,
    base: BTreeMap<(ObjectRef, u64), Reading>,
    pub(crate) devices: BTreeMap<Uuid, crate::spi::hypervisor::DeviceState>,
    pub(crate) objects: Vec<crate::spi::network::NetObject>,
    pub(crate) lease: Option<crate::spi::Stamp>,
    pub(crate) uploads: BTreeSet<Uuid>,
}

impl<P: ?Sized> Spoiled<P> {
    pub(crate) fn notes(&self) -> MutexGuard<'_, Notes> {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn is(&self, spoil: Spoil) -> bool {
        self.spoil == spoil
    }

    /// Notes a changing call, and gives the context to go on with.
    pub(crate) fn enter(&self, cx: &Ctx) -> Result<Ctx> {
        let mut notes = self.notes();
        notes.last = Some(cx.call.clone());
        notes.clouds.insert(cx.call.cloud.uuid(), cx.call.clone());
        let mut cx = cx.clone();
        if self.is(Spoil::ForgetsEpochs) {
            let newest = notes.epoch.unwrap_or_default();
            if cx.call.epoch < newest {
                return Err(Error::fenced("an old epoch"));
            }
            notes.epoch = Some(cx.call.epoch);
            // The implementation below never learns of a newer one.
            cx.call.epoch = Epoch(1);
        }
        Ok(cx)
    }
}

#[async_trait]
impl<P: ?Sized + Provider> Provider for Spoiled<P> {
    async fn hello(&self) -> Result<Hello> {
        let last = self.notes().last.clone();
        if let (Spoil::HelloRaises, Some(mut call)) = (self.spoil, last) {
            call.epoch = call.epoch.next();
            self.inner.claim(&Ctx { call, cancel: crate::spi::Cancel::new() }).await?;
        }
        let mut hello = self.inner.hello().await?;
        self.disguise(&mut hello);
        Ok(hello)
    }

    async fn claim(&self, cx: &Ctx) -> Result<Hello> {
        let cx = self.enter(cx)?;
        if self.is(Spoil::ClaimsAtOnce) {
            let (inner, cx) = (self.inner.clone(), cx.clone());
            tokio::spawn(async move { inner.claim(&cx).await });
            return self.inner.hello().await;
        }
        let mut hello = self.inner.claim(&cx).await?;
        self.disguise(&mut hello);
        Ok(hello)
    }

    async fn changes(&self, cx: &Ctx) -> Result<Feed<ObjectRef>> {
        self.inner.changes(cx).await
    }

    async fn usage(&self, cx: &Ctx, after: Option<ObjectRef>, limit: usize) -> Result<Vec<Reading>> {
        let mut readings = self.inner.usage(cx, after, limit).await?;
        for reading in &mut readings {
            match self.spoil {
                Spoil::UsageRestarts if self.reopened => self.restart(reading),
                Spoil::CountsHeaders => data::count_headers(reading),
                _ => {}
            }
        }
        Ok(readings)
    }
}

impl<P: ?Sized> Spoiled<P> {
    fn disguise(&self, hello: &mut Hello) {
        if let (Spoil::ForgetsEpochs, Some(newest)) = (self.spoil, &mut hello.newest) {
            newest.1 = self.notes().epoch.unwrap_or(newest.1);
        }
        if self.is(Spoil::KindsLie) {
            hello.kinds.extend(["vm-image".to_owned(), "volume-snapshot".to_owned()]);
        }
    }

    /// Counts from zero since the restart.
    fn restart(&self, reading: &mut Reading) {
        let key = (reading.of.clone(), reading.life);
        let base = self.notes().base.entry(key).or_insert_with(|| reading.clone()).clone();
        reading.seq = reading.seq - base.seq + 1;
        for (meter, total) in &mut reading.totals {
            *total -= base.totals.get(meter).copied().unwrap_or(0);
        }
    }
}

#[async_trait]
impl<K: Kind, P: ?Sized + Converge<K>> Converge<K> for Spoiled<P> {
    async fn ensure(&self, cx: &Ctx, id: Id<K>, rev: Rev, spec: &K::Spec) -> Result<Seen<K>> {
        let cx = self.enter(cx)?;
        let crowd = self.crowd(id, 1);
        // Lets racing calls come in.
        tokio::task::yield_now().await;
        let ended = self.spoiled_ensure(&cx, id, rev, spec, crowd).await;
        self.crowd(id, -1);
        if ended.is_err() {
            self.notes().failed.insert(id.uuid());
        } else {
            self.notes().made.insert(id.uuid());
        }
        let mut seen = ended.map_err(|e| self.lie(e))?;
        self.reseen(&mut seen);
        Ok(seen)
    }

    async fn remove(&self, cx: &Ctx, id: Id<K>, upto: Rev) -> Result<()> {
        let cx = self.enter(cx)?;
        match self.spoil {
            Spoil::AbsentIsError if self.inner.observe(&cx, id).await?.is_none() => {
                return Err(Error::not_found("there is nothing to remove"));
            }
            Spoil::KeepsAfterError if self.reopened => return Ok(()),
            Spoil::RemovesNothing | Spoil::LeaksSpace => {
                self.notes().hidden.insert(id.uuid());
                return Ok(());
            }
            _ => {}
        }
        let upto = if self.is(Spoil::RemovesNewer) { Rev(u64::MAX) } else { upto };
        let ended = self.inner.remove(&cx, id, upto).await;
        if let (Spoil::FencedButDone, Err(e)) = (self.spoil, &ended)
            && e.kind() == ErrorKind::Fenced
        {
            self.inner.remove(&self.newest(&cx).await?, id, Rev(u64::MAX)).await?;
        }
        ended.map_err(|e| self.lie(e))
    }

    async fn observe(&self, cx: &Ctx, id: Id<K>) -> Result<Option<Seen<K>>> {
        let forgotten = self.is(Spoil::ForgetsObjects) && self.reopened;
        if forgotten || self.notes().hidden.contains(&id.uuid()) {
            return Ok(None);
        }
        let mut seen = self.inner.observe(cx, id).await?;
        if let Some(seen) = &mut seen {
            self.reseen(seen);
        }
        Ok(seen)
    }

    async fn inventory(&self, cx: &Ctx, after: Option<Id<K>>, limit: usize) -> Result<Vec<Found<K>>> {
        let mut found = self.inner.inventory(cx, after, limit).await?;
        if self.is(Spoil::SkipsFirst) && after.is_none() && !found.is_empty() {
            found.remove(0);
        }
        if self.is(Spoil::ListsForeign) {
            let others: Vec<Call> = self.notes().clouds.values().cloned().collect();
            for call in others.into_iter().filter(|c| c.cloud != cx.call.cloud) {
                let cx = Ctx { call, cancel: cx.cancel.clone() };
                found.extend(self.inner.inventory(&cx, after, limit).await?);
            }
            found.sort_by_key(|f| f.id);
            found.truncate(limit);
        }
        found.retain(|f| !self.notes().hidden.contains(&f.id.uuid()));
        Ok(found)
    }
}

impl<P: ?Sized> Spoiled<P> {
    /// Counts the calls of one id that run, and says how many there are.
    fn crowd<K>(&self, id: Id<K>, change: i32) -> u32 {
        let mut notes = self.notes();
        let running = notes.running.entry(id.uuid()).or_default();
        *running = running.saturating_add_signed(change);
        *running
    }

    fn lie(&self, error: Error) -> Error {
        match self.spoil {
            Spoil::SaysNotDone => error.outcome_is(Outcome::NotDone),
            Spoil::BadIsInternal if error.kind() == ErrorKind::Invalid => Error::internal(error.public()),
            _ => error,
        }
    }

    /// The context of the newest leader.
    async fn newest(&self, cx: &Ctx) -> Result<Ctx>
    where
        P: Provider,
    {
        let mut cx = cx.clone();
        if let Some((_, epoch, _)) = self.inner.hello().await?.newest {
            cx.call.epoch = epoch;
        }
        Ok(cx)
    }

    async fn spoiled_ensure<K: Kind>(
        &self,
        cx: &Ctx,
        id: Id<K>,
        rev: Rev,
        spec: &K::Spec,
        crowd: u32,
    ) -> Result<Seen<K>>
    where
        P: Converge<K>,
    {
        let second = Id::<K>::from_uuid(Uuid::from_u128(id.uuid().as_u128() ^ 1));
        let again = self.notes().made.contains(&id.uuid());
        let twice = (self.is(Spoil::CreatesTwice) && again) || (self.is(Spoil::RacesTwice) && crowd > 1);
        if twice {
            self.inner.ensure(cx, second, rev, spec).await?;
        }
        let old = self.inner.observe(cx, id).await?;
        let rev = match &old {
            Some(old) if self.is(Spoil::AcceptsOlder) => rev.max(old.applied),
            _ => rev,
        };
        let spec = self.respec::<K>(spec, old.as_ref());
        if self.is(Spoil::LosesOnGrow) && old.is_some_and(|old| kinds::grows(&old, &spec)) {
            self.inner.remove(cx, id, rev).await?;
        }
        let ended = self.inner.ensure(cx, id, rev, &spec).await;
        if let (Spoil::FencedButDone, Err(e)) = (self.spoil, &ended)
            && e.kind() == ErrorKind::Fenced
        {
            self.inner.ensure(&self.newest(cx).await?, id, rev, &spec).await?;
        }
        ended
    }
}
