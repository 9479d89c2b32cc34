//! Who may commit: one holder at a time, each with a higher epoch than all before.
//!
//! Pure: the time comes in. A lead that has run out but that nobody has taken over still commits, because its epoch is
//! the newest; what keeps two leaders apart is the epoch, never the time.

use std::time::Duration;

use uuid::Uuid;

use crate::Epoch;
use crate::Error;
use crate::Result;
use crate::spi::state_store::Lead;

/// The newest epoch and who has it.
#[derive(Clone, Debug, Default)]
pub(super) struct Leads {
    newest: Epoch,
    holder: Option<Holder>,
}

#[derive(Clone, Debug)]
struct Holder {
    me: Uuid,
    until: Duration,
}

impl Leads {
    /// Starts with nobody in the lead: a store that is opened has no other user.
    pub(super) fn after(newest: Epoch) -> Self {
        Self { newest, holder: None }
    }

    /// Grants a lead with an epoch above `floor`; `None` while another has it.
    ///
    /// # Errors
    /// `Internal` when the epochs are used up.
    pub(super) fn take(
        &mut self,
        me: Uuid,
        ttl: Duration,
        floor: Epoch,
        now: Duration,
    ) -> Result<Option<Lead>> {
        if self.holder.as_ref().is_some_and(|h| h.me != me && now < h.until) {
            return Ok(None);
        }
        let next = self.newest.max(floor).0.checked_add(1);
        let epoch = Epoch(next.ok_or_else(|| Error::internal("no epoch is left"))?);
        self.newest = epoch;
        self.holder = Some(Holder { me, until: now.saturating_add(ttl) });
        Ok(Some(Lead { me, epoch, ttl }))
    }

    /// Prolongs the lead.
    ///
    /// # Errors
    /// `Fenced`, as [`check`](Self::check).
    pub(super) fn renew(&mut self, lead: &Lead, now: Duration) -> Result<()> {
        self.check(lead)?;
        self.holder = Some(Holder { me: lead.me, until: now.saturating_add(lead.ttl) });
        Ok(())
    }

    /// Frees the lead; one that is no longer held is left alone.
    pub(super) fn resign(&mut self, lead: &Lead) {
        if self.check(lead).is_ok() {
            self.holder = None;
        }
    }

    /// Refuses all but the newest lead.
    ///
    /// # Errors
    /// `Fenced`: another took over, or the lead was given back.
    pub(super) fn check(&self, lead: &Lead) -> Result<()> {
        let held = self.holder.as_ref().is_some_and(|h| h.me == lead.me);
        if held && lead.epoch == self.newest {
            return Ok(());
        }
        Err(Error::fenced(format!("the lead of epoch {} is over", lead.epoch))
            .remedy("take the lead anew before writing")
            .detail(format!("the newest epoch is {}", self.newest)))
    }

    /// The newest epoch.
    pub(super) fn newest(&self) -> Epoch {
        self.newest
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;

    const ANNA: Uuid = Uuid::from_u128(1);
    const BERT: Uuid = Uuid::from_u128(2);
    const TTL: Duration = Duration::from_secs(10);

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn another_waits_until_the_lead_has_run_out_and_then_fences_it() {
        let mut leads = Leads::after(Epoch(4));
        let anna = leads.take(ANNA, TTL, Epoch(0), at(0)).unwrap().unwrap();
        assert_eq!(anna.epoch, Epoch(5));
        assert_eq!(leads.take(BERT, TTL, Epoch(0), at(9)).unwrap(), None);
        leads.renew(&anna, at(9)).unwrap();
        assert_eq!(leads.take(BERT, TTL, Epoch(0), at(18)).unwrap(), None);
        let bert = leads.take(BERT, TTL, Epoch(0), at(19)).unwrap().unwrap();
        assert_eq!(leads.check(&anna).unwrap_err().kind(), ErrorKind::Fenced);
        assert_eq!(leads.renew(&anna, at(19)).unwrap_err().kind(), ErrorKind::Fenced);
        leads.resign(&anna);
        leads.check(&bert).unwrap();
    }

    #[test]
    fn a_lead_that_ran_out_still_writes_while_nobody_took_over() {
        let mut leads = Leads::default();
        let anna = leads.take(ANNA, TTL, Epoch(0), at(0)).unwrap().unwrap();
        leads.renew(&anna, at(100)).unwrap();
        leads.check(&anna).unwrap();
    }

    #[test]
    fn epochs_exceed_the_floor_and_end_without_a_panic() {
        let mut leads = Leads::after(Epoch(4));
        assert_eq!(leads.take(ANNA, TTL, Epoch(9), at(0)).unwrap().unwrap().epoch, Epoch(10));
        assert_eq!(leads.take(ANNA, TTL, Epoch(u64::MAX), at(0)).unwrap_err().kind(), ErrorKind::Internal);
        assert_eq!(leads.newest(), Epoch(10));
    }
}
